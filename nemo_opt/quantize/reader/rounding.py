"""What engines do to the inputs of a quantised linear, and to keys and values: rounding to the format's values, in plain torch.

Each rounding takes values of [..., channels] and the stored scale, and gives values of the same shape in float32. Ties go to the even code.
"""

from collections.abc import Callable

import torch

__all__ = ["ROUNDINGS", "STATIC", "round_e2m1"]

_E4M3_MAX = 448.0


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign: steps of a half below 2, of one below 4, of two above."""
    size = values.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return ((size / step).round() * step).clamp(max=6.0).copysign(values)


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _fp8(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None
    return _e4m3(values / scale) * scale


def _int8(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    assert scale is not None
    return (values / scale).round().clamp(-128, 127) * scale


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _fp8_token(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    return _fp8(values, _largest(values) / _E4M3_MAX)


def _int8_token(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    return _int8(values, _largest(values) / 127)


def _nvfp4(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`scale` is that of the block scales: amax / (6 * 448)."""
    assert scale is not None
    blocks = values.unflatten(-1, (-1, 16))
    step = _e4m3(blocks.abs().amax(dim=-1, keepdim=True) / 6.0 / scale) * scale
    rounded = round_e2m1(blocks / torch.where(step > 0, step, torch.inf)) * step
    return rounded.flatten(-2)


def _mxfp8(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    blocks = values.unflatten(-1, (-1, 32))
    power = torch.exp2((_largest(blocks).log2().floor() - 8.0).clamp(-127, 127))
    power = torch.where(_largest(blocks) > _E4M3_MAX * power, 2.0 * power, power)
    return (_e4m3(blocks / power) * power).flatten(-2)


ROUNDINGS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "fp8": _fp8,
    "int8": _int8,
    "fp8_token": _fp8_token,
    "int8_token": _int8_token,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
}
"""By the name in `LinearForm.inputs`."""

STATIC = {"fp8": _E4M3_MAX, "int8": 127.0, "nvfp4": 6.0 * _E4M3_MAX}
"""Those that need a stored scale, with the largest input that a scale of 1 stands for."""
