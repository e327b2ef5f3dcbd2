"""Activations, and the normalisation that also returns its input."""

import nemo_opt._stack

import pytest
import torch
import transformer_engine as te
from megatron.core.extensions.transformer_engine import TEActivationOp, TEFusedResidualRMSNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch import ops
from nemo_opt.errors import ConfigError


def _halves(x):
    return x.chunk(2, -1)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (ops.ReLU, functional.relu),
        (ops.GELU, lambda x: functional.gelu(x, approximate="tanh")),
        (ops.SwiGLU, lambda x: functional.silu(_halves(x)[0]) * _halves(x)[1]),
        (ops.GEGLU, lambda x: functional.gelu(_halves(x)[0], approximate="tanh") * _halves(x)[1]),
        (ops.ReGLU, lambda x: functional.relu(_halves(x)[0]) * _halves(x)[1]),
    ],
)
def test_activations(operation, expected):
    x = torch.randn(3, 8)
    torch.testing.assert_close(operation()(x), expected(x))
    torch.testing.assert_close(operation()(x.bfloat16()), expected(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="activation_func_fp8_input_store"):
        operation(cache_quantized_input=True)


def test_megatron_core_finds_its_activation():
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gated_linear_unit=True, activation_func=functional.silu, add_bias_linear=False
    )
    assert isinstance(TEActivationOp(config=config), ops.SwiGLU)


def test_residual_norm_returns_its_input_too():
    norm = TEFusedResidualRMSNorm(8)
    x = torch.randn(2, 8, requires_grad=True)
    out, residual = norm(x)
    expected = functional.rms_norm(x, (8,), norm.weight, norm.eps)
    torch.testing.assert_close((out, residual), (expected, x))
    tensors = (x, norm.weight)
    grads, expected_grads = (torch.autograd.grad((y.pow(3) + r.sin()).sum(), tensors) for y, r in ((out, residual), (expected, x)))
    torch.testing.assert_close(grads, expected_grads)
    assert list(norm.state_dict()) == ["weight", "_extra_state"]


def test_what_is_missing_is_named():
    with pytest.raises(AttributeError, match="BasicLinear is not in the CPU reference"):
        te.pytorch.ops.BasicLinear  # noqa: B018
    with pytest.raises(AttributeError, match="TransformerLayer is not in the CPU reference"):
        te.pytorch.TransformerLayer  # noqa: B018
    assert not hasattr(te.pytorch, "optimizers")
