"""The small formats, listed element by element from their bits: exact, slow, and without a line in common with nemo_opt/cpu."""

import functools
from fractions import Fraction

import pytest

# name -> exponent bits, mantissa bits, codes of a magnitude that are numbers (OFP8 1.0; MX 1.0, section 5.3)
LAYOUTS = {
    "E2M1": (2, 1, 8),
    "E2M3": (2, 3, 32),
    "E3M2": (3, 2, 32),
    "E4M3": (4, 3, 127),  # S.1111.111 is NaN
    "E5M2": (5, 2, 124),  # exponent 11111 is infinity and NaN
}


class Enumeration:
    """`elements("E2M1")`, and `nearest(value, "E2M1")`."""

    names = (*LAYOUTS, "INT8")

    @staticmethod
    @functools.cache
    def elements(name):
        """The magnitudes in the order of their codes."""
        if name == "INT8":
            return [Fraction(code) for code in range(128)]
        exponent_bits, mantissa_bits, codes = LAYOUTS[name]
        bias, found = 2 ** (exponent_bits - 1) - 1, []
        for code in range(codes):
            exponent, mantissa = divmod(code, 2**mantissa_bits)
            fraction = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
            found.append(fraction * Fraction(2) ** (max(exponent, 1) - bias))
        return found

    @classmethod
    def nearest(cls, value, name):
        """The element nearest to a float or fraction; of two equally near ones the one with the even code; beyond the largest that one."""
        value = Fraction(value)
        elements = cls.elements(name)
        code = min(range(len(elements)), key=lambda code: (abs(elements[code] - abs(value)), code % 2))
        return elements[code] if value >= 0 else -elements[code]


@pytest.fixture(scope="session")
def enumeration():
    return Enumeration
