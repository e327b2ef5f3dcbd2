"""Descriptions of FP8 and FP4 recipes.

Only descriptions: Megatron-Core subclasses and compares them, but no recipe can be executed here (`pytorch.fp8.fp8_autocast` refuses).
"""

import enum
from dataclasses import dataclass
from typing import Any

__all__ = ["DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MXFP8BlockScaling", "NVFP4BlockScaling", "Recipe"]


class Format(enum.Enum):
    """Which FP8 encodings a recipe uses forward and backward: (largest value forward, largest value backward)."""

    E4M3 = (448.0, 448.0)
    E5M2 = (57344.0, 57344.0)
    HYBRID = (448.0, 57344.0)


class Recipe:
    """Base of every recipe; each query answers which one it is."""

    def delayed(self) -> bool:
        """Whether scales come from a history of maxima."""
        return isinstance(self, DelayedScaling)

    def mxfp8(self) -> bool:
        """Whether scales are powers of two per 32 values."""
        return isinstance(self, MXFP8BlockScaling)

    def nvfp4(self) -> bool:
        """Whether values are FP4 with an FP8 scale per 16 values."""
        return isinstance(self, NVFP4BlockScaling)

    def float8_current_scaling(self) -> bool:
        """Whether scales come from the present tensor."""
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        """Whether scales are per block of 128 values."""
        return isinstance(self, Float8BlockScaling)


@dataclass
class DelayedScaling(Recipe):
    """Per-tensor FP8 scales from a history of maxima."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple[bool, bool, bool] = (False, False, False)
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    params_dtype: Any = None
    device: Any = None


@dataclass
class Float8CurrentScaling(Recipe):
    """Per-tensor FP8 scales from the present tensor."""

    fp8_format: Format = Format.HYBRID


@dataclass
class MXFP8BlockScaling(Recipe):
    """FP8 with power-of-two scales per 32 values."""

    fp8_format: Format = Format.E4M3


@dataclass
class Float8BlockScaling(Recipe):
    """FP8 with scales per block of 128 values."""

    fp8_format: Format = Format.E4M3


@dataclass
class NVFP4BlockScaling(Recipe):
    """FP4 with FP8 scales per 16 values."""

    fp8_format: Format = Format.E4M3
