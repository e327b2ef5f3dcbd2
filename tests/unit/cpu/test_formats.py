"""Rounding and scales against the formats' elements, listed one by one as exact fractions (conftest.py)."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.cpu import formats

FORMATS = [formats.E2M1, formats.E2M3, formats.E3M2, formats.E4M3, formats.E5M2, formats.INT8]
each_format = pytest.mark.parametrize("element", FORMATS, ids=lambda element: element.name)


def _rounded(values, element):
    tensor = torch.tensor(values, dtype=torch.float32)
    result = formats.round_(formats.saturate_(tensor.clone(), element), element)
    assert torch.equal(result, formats.round_(formats.saturate_(tensor, element), element, torch.empty_like(tensor, dtype=torch.int32)))
    return [Fraction(value) for value in result.tolist()]


def test_every_format_is_enumerated(enumeration):
    assert {element.name for element in FORMATS} == set(enumeration.names)
    assert enumeration.elements("E2M1") == [0, Fraction(1, 2), 1, Fraction(3, 2), 2, 3, 4, 6]


@each_format
def test_range_is_the_enumerations(enumeration, element):
    elements = enumeration.elements(element.name)
    assert elements[-1] == Fraction(element.maximum)
    assert max(value for value in elements if value and math.log2(value).is_integer()) == 2**element.max_exponent


@each_format
def test_elements_middles_and_their_neighbours_round_as_by_enumeration(enumeration, element):
    """All that can go wrong: each element, each middle between two, float32's next numbers beside both, and far beyond the range."""
    elements = [float(value) for value in enumeration.elements(element.name)]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(elements)]
    exact = np.float32([*elements, *middles, element.maximum * 1.01, element.maximum * 1.5, element.maximum * 4, 1e30])
    values = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0)), [2.0**-149, 2.0**-126]])
    values = [*values.tolist(), *(-values).tolist(), math.inf, -math.inf]
    expected = [enumeration.nearest(max(min(value, 1e30), -1e30), element.name) for value in values]
    assert _rounded(values, element) == expected


@each_format
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_value_rounds_as_by_enumeration(enumeration, element, data):
    limit = float(np.float32(element.maximum * 1.5))
    values = data.draw(st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=6))
    assert _rounded(values, element) == [enumeration.nearest(value, element.name) for value in values]


@each_format
def test_nan_stays_and_zero_is_positive(element):
    nan, zero = formats.round_(formats.saturate_(torch.tensor([math.nan, -0.0]), element), element).tolist()
    assert math.isnan(nan)
    if element is not formats.INT8:
        assert math.copysign(1, zero) == 1


@each_format
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_scale_is_the_smallest_power_of_two_that_fits(element, data):
    edges = st.integers(-140, 120).map(lambda k: float(np.float32(min(element.maximum * 2.0**k, 3e38))))
    beside = st.builds(lambda edge, up: float(np.nextafter(np.float32(edge), np.float32(math.inf if up else 0))), edges, st.booleans())
    maxima = data.draw(st.lists(st.floats(0, width=32, allow_infinity=False) | edges | beside, min_size=1, max_size=8))
    inverse, scale = formats.e8m0_scale(torch.tensor(maxima), element)
    for largest, power in zip(maxima, scale.tolist(), strict=True):
        assert math.frexp(power)[0] == 0.5
        assert 2.0**-127 <= power <= 2.0**127
        assert Fraction(largest) <= Fraction(element.maximum) * Fraction(power)
        assert power == 2.0**-127 or Fraction(largest) > Fraction(element.maximum) * Fraction(power) / 2
    assert ((inverse.double() * scale.double()) == 1).all()


def test_scale_of_what_is_not_finite_is_nan():
    inverse, scale = formats.e8m0_scale(torch.tensor([math.inf, math.nan, 0.0]), formats.E4M3)
    assert inverse.isnan().tolist() == scale.isnan().tolist() == [True, True, False]
    assert scale[2] == 2.0**-127
