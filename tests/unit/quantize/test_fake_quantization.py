"""What every algorithm's fake quantization must do to a weight, on any data: properties of ModelOpt's quantizers as the recipes set them.

The block formats' own kernels are compared bit for bit in tests/unit/cpu/test_block_quant.py.
"""

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.nn import SequentialQuantizer

from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig
from nemo_opt.quantize.recipes import quant_cfg_of

ROWS, COLUMNS, BLOCK = 32, 64, 16
STEP = {"int8": 1 / 127, "int8_sq": 1 / 127, "int4": 1 / 7, "int4_awq": 1 / 7}
"""Distance of neighbouring values beside the largest, of integers."""
RELATIVE = {"fp8": 2**-4, "block_fp8": 2**-4, "mxfp8": 2**-4}
"""Largest relative error of a normal number with three bits of mantissa."""
ALL = tuple(ALGORITHMS)
seeds = st.integers(0, 2**31 - 1)
powers = st.integers(-6, 6)


def _weight(seed, outliers=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight.view(-1)[torch.randperm(ROWS * COLUMNS, generator=generator)[:outliers]] *= 20
    return weight


def _quantised(algorithm, weight):
    """The weight after the recipe's weight quantizer, calibrated by maxima."""
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data.copy_(weight)
    quant_cfg = quant_cfg_of(
        QuantizationConfig(
            algorithm=algorithm, awq_block_size=BLOCK, fp8_block_shape=(BLOCK, BLOCK), weight_only=True, enable_kv_cache=False
        )
    )
    quant_cfg["algorithm"] = "max"
    model = mtq.quantize(torch.nn.Sequential(linear), quant_cfg)
    with torch.no_grad():
        return model[0].weight_quantizer(model[0].weight).detach()


def _amax(algorithm, weight):
    """Largest magnitude among the weights that share a scale with each one."""
    if algorithm in ("int8", "int8_sq"):
        return weight.abs().amax(dim=1, keepdim=True).expand_as(weight)
    return weight.abs().view(ROWS, -1, BLOCK).amax(dim=2, keepdim=True).expand(-1, -1, BLOCK).reshape_as(weight)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, outliers=st.sampled_from([0, 3]))
@pytest.mark.parametrize("algorithm", STEP)
def test_integers_err_by_half_a_step(algorithm, seed, outliers):
    weight = _weight(seed, outliers)
    error = (_quantised(algorithm, weight) - weight).abs()
    assert (error <= _amax(algorithm, weight) * STEP[algorithm] * (0.5 + 1e-5)).all()
    assert error.max() > 0


@settings(max_examples=10, deadline=None)
@given(seed=seeds, outliers=st.sampled_from([0, 3]))
@pytest.mark.parametrize("algorithm", RELATIVE)
def test_floats_err_by_half_a_unit_in_the_last_place(algorithm, seed, outliers):
    weight = _weight(seed, outliers)
    error = (_quantised(algorithm, weight) - weight).abs()
    least = (
        weight.abs().max() / 448 * 2**-10 * (2 if algorithm == "mxfp8" else 1)
    )  # half of the least subnormal; MX scales are powers of two
    saturated = weight.abs().max() * 2**-3 if algorithm == "mxfp8" else 0.0  # MX may cut the largest: its scale is rounded down
    bound = torch.maximum(weight.abs() * RELATIVE[algorithm], least) * (1 + 1e-5)
    assert ((error <= bound) | (error <= saturated)).all()


@settings(max_examples=8, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("algorithm", [name for name in ALL if name != "w4a8_awq"])
def test_quantising_twice_changes_no_value_by_more_than_rounding(algorithm, seed):
    once = _quantised(algorithm, _weight(seed))
    torch.testing.assert_close(_quantised(algorithm, once), once, rtol=1e-6, atol=1e-7)


@settings(max_examples=8, deadline=None)
@given(seed=seeds, power=powers)
@pytest.mark.parametrize("algorithm", ALL)
def test_scaling_by_a_power_of_two_scales_the_result(algorithm, seed, power):
    weight = _weight(seed)
    assume(weight.abs().max() > 1)
    torch.testing.assert_close(_quantised(algorithm, weight * 2.0**power), _quantised(algorithm, weight) * 2.0**power, rtol=2e-6, atol=0)


@settings(max_examples=8, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("algorithm", ALL)
def test_sign_and_zero_are_kept(algorithm, seed):
    weight = _weight(seed)
    weight[:, ::7] = 0
    weight[0] = 0
    quantised = _quantised(algorithm, weight)
    assert (quantised[weight == 0] == 0).all()
    assert (quantised * weight >= 0).all()
    torch.testing.assert_close(_quantised(algorithm, -weight), -quantised, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ALL)
def test_weight_only_leaves_inputs_as_they_are(algorithm):
    model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
    quant_cfg = quant_cfg_of(
        QuantizationConfig(algorithm=algorithm, awq_block_size=BLOCK, fp8_block_shape=(BLOCK, BLOCK), weight_only=True)
    )
    quant_cfg["algorithm"] = "max"
    mtq.quantize(model, copy.deepcopy(quant_cfg), lambda model: model(torch.randn(4, COLUMNS)))
    weight_quantizer = model[0].weight_quantizer
    assert not model[0].input_quantizer.is_enabled
    assert (weight_quantizer[0] if isinstance(weight_quantizer, SequentialQuantizer) else weight_quantizer).is_enabled
