"""The reader's roundings against ModelOpt's fake quantisation, and their own laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.quantize.reader.rounding import ROUNDINGS, STATIC, round_e2m1

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ATTRIBUTES = {
    "fp8": {"num_bits": (4, 3)},
    "int8": {"num_bits": 8},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}
RANGE = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6.0 * 448.0, "mxfp8": 1.0}
FLIPPED = 1e-3
"""Share of values that may lie on the other side of a rounding edge: the reader divides where ModelOpt multiplies. 0 of 40,960 seen."""


@pytest.mark.parametrize("form", ATTRIBUTES)
@pytest.mark.parametrize("seed", range(5))
def test_roundings_are_those_of_the_model(form, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 32, 64, generator=generator) * torch.exp(torch.randn(4, 32, 1, generator=generator))
    amax = values.abs().max() / 2  # so that some saturate
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**ATTRIBUTES[form]), amax=None if form == "mxfp8" else amax)
    found, expected = ROUNDINGS[form](values, amax / RANGE[form]), quantizer(values)
    different = ~torch.isclose(found, expected, rtol=2**-22, atol=0)
    assert different.float().mean() <= FLIPPED
    step = {"fp8": 2**-3, "int8": 1 / 127, "nvfp4": 0.5, "mxfp8": 2**-3}[form]
    assert ((found - expected).abs() <= step * values.abs().max()).all()


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20))
def test_e2m1_is_the_nearest_value(values):
    values = torch.tensor(values)
    rounded = round_e2m1(values)
    distances = (values.abs().unsqueeze(1) - E2M1).abs()
    assert torch.equal((values.abs() - rounded.abs()).abs(), distances.min(dim=1).values)
    assert torch.equal(round_e2m1(rounded), rounded)


def test_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert ROUNDINGS["int8"](torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0)).tolist() == [0, 2, 2, 0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), form=st.sampled_from(["fp8_token", "int8_token", "mxfp8"]))
def test_a_token_is_rounded_for_itself(seed, form):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    alone = torch.cat([ROUNDINGS[form](row[None], None) for row in values])
    assert torch.equal(ROUNDINGS[form](values, None), alone)
    largest = {"fp8_token": 2**-4, "int8_token": 0.5 / 127, "mxfp8": 2**-4}[form]
    assert ((alone - values).abs() <= 1.001 * largest * values.abs().amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("form", ROUNDINGS)
def test_zeros_stay_zeros(form):
    assert torch.equal(ROUNDINGS[form](torch.zeros(2, 32), torch.tensor(0.1)), torch.zeros(2, 32))


def test_e2m1_keeps_signs_and_saturates():
    rounded = round_e2m1(torch.tensor([-1.9, -0.0, 7.0, -9.0, 1.99, 3.99]))
    assert rounded.tolist() == [-2, 0, 6, -6, 2, 4]
    assert rounded.signbit().tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize(("largest", "power"), [(448.0, 0), (449.0, 1), (2.0**-140, -127), (1.75 * 2.0**127, 119)])
def test_powers_of_mx_are_the_smallest_that_suffice(largest, power):
    """Three quarters of the least value of E4M3, 2^-9 of the power, are rounded to it; of twice the power they would be to zero."""
    values = torch.zeros(1, 32)
    values[0, 0], values[0, 1] = largest, 2.0**power * 0.75 * 2.0**-9
    rounded = ROUNDINGS["mxfp8"](values, None)
    assert rounded[0, 1] == 2.0**power * 2.0**-9
    assert rounded[0, 0] == pytest.approx(largest, rel=2**-4) or power == -127


def test_stored_scales_are_amax_over_the_largest_value():
    assert STATIC == {"fp8": 448, "int8": 127, "nvfp4": 6 * 448}


def test_int8_has_its_whole_range():
    values = torch.tensor([-200.0, -128.0, 127.4, 200.0])
    assert ROUNDINGS["int8"](values, torch.tensor(1.0)).tolist() == [-128, -128, 127, 127]
    assert ROUNDINGS["fp8"](torch.tensor([-900.0, 900.0]), torch.tensor(0.5)).tolist() == [-224, 224]
