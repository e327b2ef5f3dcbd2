"""A weight as codes and scales: the very values that the fake quantisation of the model uses, before they are packed and named.

Decisions:
- Codes come from the same float32 expressions as ModelOpt's fake quantisation, product with 448 / amax included, so that no value lies on
  the other side of a rounding edge. The stored scale is the reciprocal that FP8 uses itself, so FP8 is exact; integers divide where a
  consumer multiplies, which is one rounding of float32 (2^-23 relative).
- A scale is kept in float32, whatever the weights' dtype: engines round it to theirs when they load it, files need not do so before.

Formats: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433 (E4M3); OCP Microscaling Formats 1.0 (MXFP8, E2M1, E8M0);
NVFP4: E2M1 with E4M3 scales of 16 values under one float32 scale, amax / (6 * 448).
"""

from dataclasses import dataclass

import torch

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.export.formats import Kind, LinearFormat

__all__ = ["Codes", "code_weight", "fp8_scale", "int_scale"]

_E4M3_MAX, _E4M3_FRACTION, _E2M1_MAX, _SMALLEST_AMAX = 448.0, 0.875, 6.0, 2.0**-24
_E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A coded weight. Rows are those of the weight."""

    values: torch.Tensor
    """[rows, columns]: float8_e4m3fn, int8, or uint8 with sign and E2M1 index in the low four bits."""
    scale: torch.Tensor
    """[] for FP8; [rows, 1] for INT8; [rows, blocks], or [row blocks, blocks]; float32, float8_e4m3fn (NVFP4) or uint8 (E8M0)."""
    scale_2: torch.Tensor | None = None
    """[]: the second scale of NVFP4 and W4A8."""


def code_weight(weight: torch.Tensor, form: LinearFormat, amax: torch.Tensor | None, amax_2: torch.Tensor | None = None) -> Codes:
    """Codes of a whole weight.

    Args:
        weight: [rows, columns].
        form: The format.
        amax: Of its (first) quantizer, with one entry for each scale; None for MXFP8.
        amax_2: Of the second quantizer of W4A8.

    """
    weight = weight.float()
    if form.kind is Kind.MXFP8:
        return _mxfp8(weight)
    assert amax is not None, "a format with scales from calibration"
    if form.kind is Kind.FP8:
        return Codes(values=_e4m3(weight, amax.reshape(())), scale=fp8_scale(amax.reshape(())))
    if form.kind is Kind.NVFP4:
        return _nvfp4(weight, amax.reshape(()))
    if form.kind is Kind.INT8:
        amax = amax.reshape(-1, 1)
        return Codes(values=_integer(weight, amax, 127), scale=int_scale(amax, 127))
    rows, columns = form.block
    amax = amax.reshape(weight.shape[0] // rows, weight.shape[1] // columns)
    spread = amax.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    if form.kind is Kind.FP8_BLOCK:
        return Codes(values=_e4m3(weight, spread), scale=fp8_scale(amax))
    scale_2 = None if amax_2 is None else fp8_scale(amax_2.reshape(()))
    return Codes(values=_integer(weight, spread, 7), scale=int_scale(amax, 7), scale_2=scale_2)


def fp8_scale(amax: torch.Tensor) -> torch.Tensor:
    """What an E4M3 code is multiplied by: 1 / (448 / amax) in float32; 1 where amax is zero."""
    return 1.0 / (_E4M3_MAX / _safe(amax))


def int_scale(amax: torch.Tensor, bound: int) -> torch.Tensor:
    """What an integer code is multiplied by: 1 / (bound / amax) in float32; 1 where amax is zero."""
    amax = amax.float()
    return torch.where(amax <= _SMALLEST_AMAX, torch.ones_like(amax), 1.0 / _steps(amax, bound))


def _steps(amax: torch.Tensor, bound: int) -> torch.Tensor:
    """Bound / amax as a division of tensors: torch takes a number over a tensor as the number times the reciprocal, which rounds twice."""
    safe = _safe(amax)
    return torch.full_like(safe, bound) / safe


def _safe(amax: torch.Tensor) -> torch.Tensor:
    amax = amax.float()
    if bool((amax < 0).any()) or not bool(amax.isfinite().all()):
        raise ConfigError(f"amax must be finite and not negative, got {amax.min().item()} to {amax.max().item()}: calibrate again")
    return torch.where(amax <= _SMALLEST_AMAX, torch.ones_like(amax), amax)


def _e4m3(weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return (weight * (_E4M3_MAX / _safe(amax))).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def _integer(weight: torch.Tensor, amax: torch.Tensor, bound: int) -> torch.Tensor:
    scale = torch.where(amax <= _SMALLEST_AMAX, torch.zeros_like(amax), _steps(amax, bound))
    return (weight * scale).round().clamp(-bound - 1, bound).to(torch.int8)


def _nvfp4(weight: torch.Tensor, amax: torch.Tensor) -> Codes:
    blocks = weight.unflatten(1, (-1, 16))
    scale_2 = amax.float() / (_E2M1_MAX * _E4M3_MAX)
    unit = _E2M1_MAX * scale_2
    scale = (blocks.abs().amax(dim=2) / torch.where(unit > 0, unit, torch.inf)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scale.float() * scale_2).unsqueeze(2)
    return Codes(values=_e2m1(blocks / torch.where(step > 0, step, torch.inf)).flatten(1), scale=scale, scale_2=scale_2)


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """Index 0..7 of the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (ties to the even index), plus 8 for negative values."""
    size = values.abs()
    index = torch.zeros(values.shape, dtype=torch.uint8)
    for number, edge in enumerate(_E2M1_EDGES):
        index += size >= edge if number % 2 else size > edge
    return torch.where((values < 0) & (index > 0), index + 8, index)


def _mxfp8(weight: torch.Tensor) -> Codes:
    blocks = weight.unflatten(1, (-1, 32))
    fraction, exponent = torch.frexp(blocks.abs().amax(dim=2, keepdim=True))
    # the smallest power of two by which the largest value is at most 448 = 0.875 * 2^9
    exponent = torch.where(fraction > 0, exponent - 9 + (fraction > _E4M3_FRACTION), -127).clamp(-127, 127)
    values = torch.ldexp(blocks, -exponent).to(torch.float8_e4m3fn)
    return Codes(values=values.flatten(1), scale=(exponent.squeeze(2) + 127).to(torch.uint8))
