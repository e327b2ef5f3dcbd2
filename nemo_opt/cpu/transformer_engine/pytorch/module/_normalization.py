"""LayerNorm and RMSNorm with hand-written gradients, for the modules whose backward pass is their own.

Statistics and products are taken in float32 (float64 for float64 input), the result has the input's type.
"""

from dataclasses import dataclass

import torch

__all__ = ["NormOptions", "norm_backward", "norm_forward"]


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    """Which normalisation."""

    kind: str
    """"LayerNorm" or "RMSNorm"."""

    eps: float
    """Added to the variance or mean square."""

    zero_centered_gamma: bool
    """The weight is stored minus 1."""


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gamma(weight: torch.Tensor, options: NormOptions, dtype: torch.dtype) -> torch.Tensor:
    gamma = weight.to(dtype)
    return gamma + 1 if options.zero_centered_gamma else gamma


def _normalised(x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor) -> torch.Tensor:
    x = x.to(rstd.dtype)
    return (x if mean is None else x - mean) * rstd


def norm_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: NormOptions
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Normalise over the last dim.

    Args:
        x: [..., H].
        weight: [H].
        bias: [H] or None.
        options: which normalisation.

    Returns:
        (result [..., H], mean [..., 1] or None for RMSNorm, reciprocal deviation [..., 1]).
    """
    wide = x.to(_compute_dtype(x))
    mean = wide.mean(-1, keepdim=True) if options.kind == "LayerNorm" else None
    centred = wide if mean is None else wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + options.eps)
    out = centred * rstd * _gamma(weight, options, wide.dtype)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype), mean, rstd


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor, options: NormOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_forward`: of x [..., H], weight [H] and bias [H]."""
    hat = _normalised(x, mean, rstd)
    wide_grad = grad.to(rstd.dtype)
    scaled = wide_grad * _gamma(weight, options, rstd.dtype)
    inner = scaled - hat * (scaled * hat).mean(-1, keepdim=True)
    if mean is not None:
        inner = inner - scaled.mean(-1, keepdim=True)
    features = x.shape[-1]
    grad_weight = (wide_grad * hat).reshape(-1, features).sum(0)
    grad_bias = wide_grad.reshape(-1, features).sum(0)
    return (inner * rstd).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
