"""`LayerNorm` and `RMSNorm` against plain torch."""

import pytest
import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.layernorm import LayerNorm
from nemo_opt.cpu.transformer_engine.pytorch.module.rmsnorm import RMSNorm
from nemo_opt.errors import ConfigError


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_equals_torch(kind, centred):
    module = kind(8, eps=1e-3, zero_centered_gamma=centred, params_dtype=torch.float64, sequence_parallel=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.linspace(-1, 1, 8, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gamma = module.weight + (1 if centred else 0)
    rest = (8,), gamma, *([module.bias] if kind is LayerNorm else []), 1e-3
    expected = (functional.layer_norm if kind is LayerNorm else functional.rms_norm)(x, *rest)
    tensors = [x, *module.parameters()]
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(torch.autograd.grad(module(x).pow(3).sum(), tensors), torch.autograd.grad(expected.pow(3).sum(), tensors))
    assert all(parameter.sequence_parallel for parameter in module.parameters())


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_result_has_the_type_of_the_weight(kind):
    assert kind(8).bfloat16()(torch.randn(2, 8)).dtype == torch.bfloat16
    assert kind(8)(torch.randn(2, 8).bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind(8)(torch.randn(2, 8)).dtype == torch.bfloat16


def test_a_pruned_weight_is_followed():
    module = RMSNorm(8)
    module.weight = torch.nn.Parameter(module.weight[:4].detach())
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), functional.rms_norm(x, (4,), module.weight, module.eps))


def test_keys_shapes_and_names_of_old():
    assert list(LayerNorm(8).state_dict()) == ["weight", "bias", "_extra_state"]
    assert list(RMSNorm(hidden_size=8).state_dict()) == ["weight", "_extra_state"]
    meta = RMSNorm((8,), device="meta", zero_centered_gamma=True)
    assert meta.weight.is_meta
    meta.reset_layer_norm_parameters()
    assert meta.weight.eq(0).all()


def test_refusals():
    with pytest.raises(ConfigError, match="normalized_shape"):
        RMSNorm()
    with pytest.raises(ConfigError, match="fwd_ln_sm_margin"):
        LayerNorm(8, fwd_ln_sm_margin=4)
    assert LayerNorm(8, fwd_ln_sm_margin=0).eps == 1e-5
