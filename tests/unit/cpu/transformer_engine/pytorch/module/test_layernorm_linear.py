"""`LayerNormLinear` against plain torch, what it returns besides, and sequence parallelism on two ranks."""

import pytest
import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module import layernorm_linear
from nemo_opt.cpu.transformer_engine.pytorch.module.layernorm_linear import LayerNormLinear
from nemo_opt.errors import ConfigError

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums of 16 terms in another order differ by about 1e-15


def _make(normalization="RMSNorm", centred=False, **kwargs):
    module = LayerNormLinear(8, 6, normalization=normalization, zero_centered_gamma=centred, params_dtype=torch.float64, **kwargs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return module


def _input(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


def _norm(module, x):
    gamma = module.layer_norm_weight + (1 if module.zero_centered_gamma else 0)
    if module.normalization == "RMSNorm":
        return functional.rms_norm(x, (8,), gamma, module.eps)
    return functional.layer_norm(x, (8,), gamma, module.layer_norm_bias, module.eps)


def _direction(like):
    return torch.sin(torch.arange(like.numel(), dtype=like.dtype)).reshape(like.shape)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(normalization, centred, bias):
    module = _make(normalization, centred, bias=bias)
    x = _input(3, 2, 8)
    expected = functional.linear(_norm(module, x), module.weight, module.bias if bias else None)
    out = module(x)
    tensors = [x, *module.parameters()]
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad((out * _direction(out)).sum(), tensors),
        torch.autograd.grad((expected * _direction(out)).sum(), tensors),
        **EXACT,
    )
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, **EXACT)


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_normalised_input_is_returned_with_its_gradient(return_bias, gathered):
    module = _make(return_layernorm_output=True, return_layernorm_output_gathered=gathered, return_bias=return_bias)
    x = _input(3, 2, 8)
    out, *bias, normalised = module(x)
    assert len(bias) == return_bias
    expected = _norm(module, x)
    torch.testing.assert_close(normalised, expected, **EXACT)
    tensors = [x, module.layer_norm_weight, module.weight]
    expected_out = functional.linear(expected, module.weight, None if return_bias else module.bias)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum() + (normalised * _direction(normalised)).sum(), tensors),
        torch.autograd.grad(expected_out.sum() + (expected * _direction(expected)).sum(), tensors),
        **EXACT,
    )


def test_returning_the_normalised_input_can_be_switched_on_later():
    module = _make(bias=False)
    module.return_layernorm_output = True
    with torch.no_grad():
        out, normalised = module(_input(2, 8))
    assert out.shape == (2, 6)
    assert normalised.shape == (2, 8)


def test_products_come_in_the_order_that_modelopt_counts(monkeypatch):
    calls = []
    original = layernorm_linear.general_gemm
    monkeypatch.setattr(layernorm_linear, "general_gemm", lambda *a, **k: calls.append(k.get("layout", "TN")) or original(*a, **k))
    module = _make()
    module(_input(2, 8).detach()).sum().backward()
    assert calls == ["TN", "NN", "NT"]


def test_state_dict_keys():
    assert list(_make("LayerNorm").state_dict()) == ["layer_norm_weight", "layer_norm_bias", "weight", "bias", "_extra_state"]
    assert list(_make("RMSNorm", bias=False).state_dict()) == ["layer_norm_weight", "weight", "_extra_state"]


def test_first_values():
    assert LayerNormLinear(4, 4).layer_norm_weight.eq(1).all()
    assert LayerNormLinear(4, 4, zero_centered_gamma=True).layer_norm_weight.eq(0).all()
    assert LayerNormLinear(4, 4, device="meta").layer_norm_weight.is_meta


def test_row_mode_adds_the_bias_after_the_sum():
    module = _make(parallel_mode="row")
    x = _input(2, 8)
    torch.testing.assert_close(module(x), functional.linear(_norm(module, x), module.weight, module.bias), **EXACT)


def test_refusals():
    with pytest.raises(ConfigError, match="normalization"):
        LayerNormLinear(4, 4, normalization="BatchNorm")
    with pytest.raises(ConfigError, match="ub_bulk_wgrad"):
        LayerNormLinear(4, 4, ub_bulk_wgrad=True)
    with pytest.raises(TypeError, match="unheard_of"):
        LayerNormLinear(4, 4, unheard_of=True)
    with pytest.raises(ConfigError, match="fp8_grad"):
        LayerNormLinear(4, 4)(torch.zeros(1, 4), fp8_grad=True)


def test_bfloat16_keeps_its_type_and_is_normalised_in_float32():
    module = _make(bias=False).bfloat16()
    x = _input(5, 8).detach().bfloat16()
    gamma = module.layer_norm_weight.float()
    normalised = functional.rms_norm(x.float(), (8,), gamma, module.eps).bfloat16()
    torch.testing.assert_close(module(x), functional.linear(normalised, module.weight), rtol=0, atol=0)


def _with_sequence_parallel(gathered):
    import torch.distributed as dist

    rank = dist.get_rank()
    whole = _make()
    module = LayerNormLinear(
        8,
        6,
        normalization="RMSNorm",
        params_dtype=torch.float64,
        parallel_mode="column",
        sequence_parallel=True,
        tp_group=dist.group.WORLD,
        return_layernorm_output=True,
        return_layernorm_output_gathered=gathered,
    )
    with torch.no_grad():
        module.layer_norm_weight.copy_(whole.layer_norm_weight)
        module.weight.copy_(whole.weight.chunk(2)[rank])
        module.bias.copy_(whole.bias.chunk(2)[rank])
    x = _input(4, 3, 8).detach().chunk(2)[rank].requires_grad_()
    out, normalised = module(x)
    loss = (out * _direction(torch.empty(4, 3, 6, dtype=torch.float64)).chunk(2, dim=2)[rank]).sum()
    mine = normalised.chunk(2)[rank] if gathered else normalised  # of what all ranks have, each uses its half
    loss = loss + mine.square().sum()
    tensors = [x, module.layer_norm_weight, module.weight, module.bias]
    assert module.layer_norm_weight.sequence_parallel
    return out.detach(), normalised.detach(), torch.autograd.grad(loss, tensors)


@pytest.mark.ranks
@pytest.mark.parametrize("gathered", [False, True])
def test_two_ranks_with_sequence_parallel_equal_one(ranks, gathered):
    module = _make()
    x = _input(4, 3, 8)
    normalised = _norm(module, x)
    out = functional.linear(normalised, module.weight, module.bias)
    tensors = [x, module.layer_norm_weight, module.weight, module.bias]
    expected = torch.autograd.grad((out * _direction(out)).sum() + normalised.square().sum(), tensors)
    (out0, norm0, grads0), (out1, norm1, grads1) = ranks(2).run(_with_sequence_parallel, gathered)
    torch.testing.assert_close(torch.cat([out0, out1], -1), out, **EXACT)
    torch.testing.assert_close(norm0 if gathered else torch.cat([norm0, norm1]), normalised, **EXACT)
    torch.testing.assert_close(torch.cat([grads0[0], grads1[0]]), expected[0], **EXACT)
    torch.testing.assert_close(grads0[1] + grads1[1], expected[1], **EXACT)
    torch.testing.assert_close(torch.cat([grads0[2], grads1[2]]), expected[2], **EXACT)
    torch.testing.assert_close(torch.cat([grads0[3], grads1[3]]), expected[3], **EXACT)
