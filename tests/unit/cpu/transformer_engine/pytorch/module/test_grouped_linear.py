"""`GroupedLinear` against one product per group."""

import pytest
import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.fp8_padding import Fp8Padding, Fp8Unpadding
from nemo_opt.cpu.transformer_engine.pytorch.module.grouped_linear import GroupedLinear
from nemo_opt.errors import ConfigError

SPLITS = [2, 0, 3]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_equals_one_product_per_group(bias, as_tensor):
    torch.manual_seed(0)
    module = GroupedLinear(3, 4, 6, bias=bias, params_dtype=torch.float64)
    if bias:
        with torch.no_grad():
            for i in range(3):
                getattr(module, f"bias{i}").fill_(i + 1.0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    parameters = [(getattr(module, f"weight{i}"), getattr(module, f"bias{i}") if bias else None) for i in range(3)]
    expected = torch.cat([functional.linear(group, *of_group) for group, of_group in zip(x.split(SPLITS), parameters, strict=True)])
    out = module(x, torch.tensor(SPLITS) if as_tensor else SPLITS)
    tensors = [x, *module.parameters()]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.pow(2).sum(), tensors), torch.autograd.grad(expected.pow(2).sum(), tensors))
    with torch.no_grad():
        torch.testing.assert_close(module(x, SPLITS), expected)


def test_returned_biases_are_not_added():
    module = GroupedLinear(2, 4, 6, return_bias=True)
    out, biases = module(torch.zeros(3, 4), [1, 2])
    assert out.eq(0).all()
    assert [bias.shape for bias in biases] == [(6,), (6,)]


def test_keys_and_cuts():
    assert list(GroupedLinear(2, 4, 6).state_dict()) == ["weight0", "bias0", "weight1", "bias1", "_extra_state"]
    column = GroupedLinear(2, 4, 6, tp_size=2, parallel_mode="column")
    row = GroupedLinear(2, 4, 6, tp_size=2, parallel_mode="row")
    assert (column.weight1.shape, row.weight1.shape) == ((3, 4), (6, 2))
    assert (column.weight0.partition_dim, column.bias0.partition_dim, row.weight0.partition_dim) == (0, 0, 1)


def test_refusals():
    module = GroupedLinear(2, 4, 6)
    with pytest.raises(ConfigError, match="3 group sizes"):
        module(torch.zeros(3, 4), [1, 1, 1])
    with pytest.raises(ConfigError, match="delay_wgrad_compute"):
        GroupedLinear(2, 4, 6, delay_wgrad_compute=True)
    with pytest.raises(ConfigError, match="parallel_mode"):
        GroupedLinear(2, 4, 6, parallel_mode="diagonal")
    with pytest.raises(ConfigError, match="do not divide"):
        GroupedLinear(2, 4, 5, tp_size=2, parallel_mode="column")


def test_main_grads_collect():
    module = GroupedLinear(2, 4, 6, bias=False, fuse_wgrad_accumulation=True)
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    module(torch.ones(3, 4), [1, 2]).sum().backward()
    assert module.weight0.main_grad.eq(1).all()
    assert module.weight1.main_grad.eq(2).all()


def test_padding_is_undone():
    x = torch.arange(10.0).reshape(5, 2).requires_grad_()
    padded, splits = Fp8Padding(3, 4)(x, SPLITS)
    assert splits == [4, 0, 4]
    assert padded.shape == (8, 2)
    assert padded[2:4].eq(0).all()
    assert padded[7].eq(0).all()
    back = Fp8Unpadding(3, 4)(padded, SPLITS)
    torch.testing.assert_close(back, x)
    aligned = torch.ones(4, 2)
    assert Fp8Padding(1, 4)(aligned, [4])[0] is aligned
    assert Fp8Unpadding(1, 4)(aligned, [4]) is aligned
    with pytest.raises(ValueError, match="2 group sizes"):
        Fp8Padding(3)(x, [2, 3])
