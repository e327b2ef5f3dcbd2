"""The small number formats that block-scaled tensors are made of, and rounding to them in float32 arithmetic.

Decisions:

* A value is rounded by adding and subtracting 1.5 * 2^(23 - m) times the power of two below it: float32's own addition then rounds to
  the nearest element, halves to even, in four passes over memory and without a table. Subnormal elements are the case in which the
  power of two is held at the format's smallest normal one.
* Rounding and saturating are two functions: with a scale that is rounded up nothing can exceed the format, and the pass is saved.
* A result of zero is +0, whatever the sign of the value.

Sources: E4M3 and E5M2, OCP 8-bit Floating Point (OFP8) 1.0; E2M1, E2M3, E3M2, INT8 and E8M0, OCP Microscaling Formats (MX) 1.0, section 5.
"""

import functools
import math
from dataclasses import dataclass

import torch

__all__ = ["E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "INT8", "ElementFormat", "e8m0_scale", "not_finite", "round_", "saturate_"]

_EXPONENT = 0x7F800000  # float32's exponent field
_FRACTION_BITS, _BIAS = 23, 127  # of float32


@dataclass(frozen=True, kw_only=True)
class ElementFormat:
    """A format of single elements: sign and magnitude, without infinities."""

    name: str
    """As ModelOpt and the standards call it."""
    mantissa_bits: int
    """Digits after the binary point of a normal element; all digits are integer digits where `min_exponent` is None."""
    min_exponent: int | None
    """Exponent of the smallest normal element; subnormal ones go on with its step. None for integers."""
    maximum: float
    """Largest magnitude."""

    @functools.cached_property
    def max_exponent(self) -> int:
        """Exponent of the largest power of two among the elements."""
        return math.frexp(self.maximum)[1] - 1


E2M1 = ElementFormat(name="E2M1", mantissa_bits=1, min_exponent=0, maximum=6.0)
E2M3 = ElementFormat(name="E2M3", mantissa_bits=3, min_exponent=0, maximum=7.5)
E3M2 = ElementFormat(name="E3M2", mantissa_bits=2, min_exponent=-2, maximum=28.0)
E4M3 = ElementFormat(name="E4M3", mantissa_bits=3, min_exponent=-6, maximum=448.0)
E5M2 = ElementFormat(name="E5M2", mantissa_bits=2, min_exponent=-14, maximum=57344.0)
INT8 = ElementFormat(name="INT8", mantissa_bits=7, min_exponent=None, maximum=127.0)  # -128 left out: MX 1.0, 5.3.4, allows that


def saturate_(values: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    """Brings values (float32, any shape) into the format's range, in place; NaN stays."""
    return values.clamp_(-element.maximum, element.maximum)


def round_(values: torch.Tensor, element: ElementFormat, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """Rounds values to the nearest element, halves to the even one, in place.

    Args:
        values: float32, any shape; magnitudes that round to more than the format's maximum are not cut off, see `saturate_`.
        element: The format.
        scratch: int32 of the same shape, overwritten; made if not given.

    Returns:
        `values`. NaN stays NaN; the sign of a zero is lost.
    """
    if element.min_exponent is None:
        return values.round_()
    powers = torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=scratch).clamp_min_(
        (element.min_exponent + _BIAS) << _FRACTION_BITS
    )
    anchor = 1.5 * 2.0 ** (_FRACTION_BITS - element.mantissa_bits)  # times a power of two: exact, and its last digit counts elements
    return values.add_(powers.view(torch.float32), alpha=anchor).sub_(powers.view(torch.float32), alpha=anchor)


def not_finite(magnitudes: torch.Tensor) -> torch.Tensor:
    """Which magnitudes (float32, not negative) are infinite or NaN."""
    return magnitudes.view(torch.int32) >= _EXPONENT


def e8m0_scale(maxima: torch.Tensor, element: ElementFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest power of two by which the largest magnitudes fit the format, held within E8M0's 2^-127 ... 2^127.

    MX 1.0 leaves the choice of the scale open; its example (6.3) rounds the exponent down, so that the largest elements may saturate.
    ModelOpt and Transformer Engine round it up, and so does this. Exact: exponents and fractions are compared as integers.

    Args:
        maxima: Largest magnitudes of the blocks, float32, not negative, any shape.
        element: The format of the elements.

    Returns:
        The scales' inverses and the scales, float32. Infinite or NaN maxima give NaN, E8M0's only special value.
    """
    fraction_of_maximum = round((math.ldexp(element.maximum, -element.max_exponent) - 1) * 2**_FRACTION_BITS)
    up = (1 << _FRACTION_BITS) - 1 - fraction_of_maximum  # carries into the exponent where the fraction exceeds the maximum's
    exponents = ((maxima.view(torch.int32) + up) >> _FRACTION_BITS) - element.max_exponent
    exponents = exponents.clamp_(0, 2 * _BIAS).masked_fill_(not_finite(maxima), 2 * _BIAS + 1)
    return _power_of_two(2 * _BIAS - exponents, exponents), _power_of_two(exponents, exponents)


def _power_of_two(biased: torch.Tensor, e8m0: torch.Tensor) -> torch.Tensor:
    """2^(biased - 127); 2^-127 is subnormal in float32, and E8M0's code 255 is NaN."""
    powers = (biased << _FRACTION_BITS).view(torch.float32)
    return powers.masked_fill_(biased == 0, 2.0**-_BIAS).masked_fill_(e8m0 == 2 * _BIAS + 1, math.nan)
