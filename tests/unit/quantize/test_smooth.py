"""SmoothQuant's scales on a small model without ranks; tests/unit/quantize/test_algorithms.py compares layouts."""

from types import SimpleNamespace
from unittest.mock import patch

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from modelopt.torch.quantization.config import QuantizeConfig

from nemo_opt.quantize import smooth
from nemo_opt.quantize.smooth import smooth_scale, smoothquant

ALPHA = 0.25
GROUPED = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=3)
"""Channels 0-2 and 3-5 multiply one value head's channels, 6-8 and 9-11 the other's."""


class _Model(torch.nn.Module):
    def __init__(self, attention=GROUPED):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name in ("linear_qkv", "linear_proj", "head", "weights_only", "in_fp8"):
            linear = torch.nn.Linear(12, 12, bias=False)
            linear.weight.data = torch.randn(12, 12, generator=generator)
            linear.config = attention
            self.add_module(name, linear)
        self.x = torch.randn(20, 12, generator=generator) * torch.logspace(-1, 1, 12)

    def forward(self):
        return [linear(self.x) for linear in self.children()]


def _quantised(model, alpha=ALPHA):
    off = {"quantizer_name": "*head*", "enable": False}
    fp8 = [{"quantizer_name": f"*in_fp8.{part}_quantizer", "cfg": {"num_bits": (4, 3)}} for part in ("input", "weight")]
    cfg = mtq.INT8_DEFAULT_CFG["quant_cfg"] + [off, {"quantizer_name": "*weights_only.input_quantizer", "enable": False}, *fp8]
    mtq.quantize(model, QuantizeConfig(quant_cfg=cfg, algorithm=None).model_dump())
    smoothquant(model, lambda model: model(), alpha=alpha)
    return model


def test_scale_is_equation_4():
    activations, weights = torch.tensor([16.0, 1.0, 81.0]), torch.tensor([1.0, 16.0, 16.0])
    assert smooth_scale(activations, weights, alpha=0.25).tolist() == pytest.approx([1 / 2, 8.0, 8 / 3])
    assert smooth_scale(activations, weights, alpha=1.0).tolist() == pytest.approx([1 / 16, 1.0, 1 / 81])
    assert smooth_scale(activations, weights, alpha=0.0).tolist() == pytest.approx([1.0, 16.0, 16.0])


def test_scale_has_limits_and_leaves_what_is_always_zero():
    activations = torch.tensor([1e9, 1e-9, 0.0, 3.0, 0.0], dtype=torch.bfloat16)
    weights = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0], dtype=torch.bfloat16)
    scale = smooth_scale(activations, weights, alpha=1.0)
    assert scale.dtype == torch.float32
    assert scale.tolist() == pytest.approx([1e-4, 1e4, 1.0, 1.0, 1.0])


def test_channels_of_one_value_channel_have_one_maximum():
    amax = torch.tensor([1.0, 8, 3, 4, 5, 9, 2, 2, 2, 1, 7, 6])
    assert smooth._largest_of_group(amax, 2, 3).tolist() == [4, 8, 9, 4, 8, 9, 2, 7, 6, 2, 7, 6]


@pytest.mark.parametrize(("heads", "groups", "group"), [(4, 2, (2, 3)), (4, 1, (4, 3)), (4, 4, None), (4, None, None)])
def test_query_heads_of_a_group(heads, groups, group):
    linear = SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads, num_query_groups=groups, kv_channels=3))
    assert smooth._query_group(linear) == group


@pytest.mark.parametrize("name", ["linear_qkv", "linear_proj"])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_smoothed_linears_are_calibrated_for_what_they_see(name, alpha):
    before = _Model()
    linear, original = getattr(_quantised(_Model(), alpha), name), getattr(before, name).weight
    activations, weights = before.x.abs().amax(dim=0), original.abs().amax(dim=0)
    shared = [smooth._largest_of_group(amax, 2, 3) if name == "linear_proj" else amax for amax in (activations, weights)]
    scale = smooth_scale(*shared, alpha=alpha)
    assert name == "linear_qkv" or torch.equal(scale[:3], scale[3:6])
    torch.testing.assert_close(linear.input_quantizer.pre_quant_scale, scale)
    torch.testing.assert_close(linear.weight, original / scale)
    torch.testing.assert_close(linear.input_quantizer.amax, (before.x * scale).abs().max())
    torch.testing.assert_close(linear.weight_quantizer.amax, linear.weight.abs().amax(dim=1, keepdim=True))
    assert linear.input_quantizer.axis is None
    assert not hasattr(linear.input_quantizer, "_amax_for_smoothing"), "not part of a checkpoint"
    expected = (before.x @ original.T).detach()
    torch.testing.assert_close(linear(before.x).detach(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_each_query_head_keeps_its_own_scale_where_it_has_a_value_head():
    model = _quantised(_Model(SimpleNamespace(num_attention_heads=4, num_query_groups=4, kv_channels=3)))
    before = _Model()
    expected = smooth_scale(before.x.abs().amax(dim=0), before.linear_proj.weight.abs().amax(dim=0), alpha=ALPHA)
    torch.testing.assert_close(model.linear_proj.input_quantizer.pre_quant_scale, expected)


@pytest.mark.parametrize("name", ["head", "weights_only", "in_fp8"])
def test_only_linears_with_int8_on_both_sides_are_smoothed(name):
    linear = getattr(_quantised(_Model()), name)
    assert linear.input_quantizer.pre_quant_scale is None
    assert torch.equal(linear.weight, getattr(_Model(), name).weight)


def _maxima_over_ranks(is_column, tp):
    """Scale of a linear whose other rank has maxima twice as large, and the collectives."""
    calls = []

    def all_reduce(tensor, op, group):
        if group is None:  # ModelOpt's own, in a world of one that other tests may have opened in this process
            return
        calls.append((op, group))
        tensor.mul_(1 + len(calls))

    with patch.object(smooth, "parallel_state") as state, patch.object(smooth.dist, "all_reduce", all_reduce):
        state.get_tensor_model_parallel_world_size.return_value = tp
        state.get_tensor_model_parallel_group.return_value = "tp"
        model = _Model()
        model.linear_qkv._is_column_parallel = is_column
        scale = _quantised(model).linear_qkv.input_quantizer.pre_quant_scale
    return scale, calls


def test_column_parallel_linears_take_maxima_over_ranks():
    plain, none = _maxima_over_ranks(is_column=False, tp=2)
    assert none == []
    single, none = _maxima_over_ranks(is_column=True, tp=1)
    assert none == []
    assert torch.equal(single, plain)
    scale, calls = _maxima_over_ranks(is_column=True, tp=2)
    assert calls == [(dist.ReduceOp.MAX, "tp")] * 2
    torch.testing.assert_close(scale, plain * 3**0.75 / 2**0.25)
