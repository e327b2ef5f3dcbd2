"""Fake quantization to integers by pieces that stay in the processor's cache, with ModelOpt's results to the bit."""

import torch

__all__ = ["fake_integers"]

_PIECE = 1 << 17
"""Elements of a piece: 512 KB of float32, which the second-level cache holds."""

_DEAD = 2.0**-24
"""Channels whose largest magnitude is no larger count as zero."""


def fake_integers(inputs: torch.Tensor, amax: torch.Tensor, num_bits: int = 8, narrow_range: bool = True) -> torch.Tensor:
    """ModelOpt's `_tensor_quant` of signed integers: round(inputs * (bound / amax)), clamped, divided by the same factor.

    A product of three passes over memory instead of eight, one of which (a clamp between tensors) takes a sixth of a model's forward pass.

    Args:
        inputs: A floating-point type, any shape, not empty.
        amax: Largest magnitudes, of a shape that broadcasts to the inputs'; none is negative.
        num_bits: Of the integers.
        narrow_range: Whether the least integer is left out, so that the range is symmetric.

    Returns:
        The quantized values, of the inputs' shape and type.

    Raises:
        ValueError: An amax is negative.

    """
    source, amax = inputs.detach(), amax.detach().float()
    smallest = amax.min()
    if smallest < 0:
        raise ValueError("Negative values in amax")
    bound = 2.0 ** (num_bits - 1) - 1.0
    least = -bound if narrow_range else -bound - 1.0
    if amax.numel() == 1:
        source, amax = source.reshape(-1), amax.reshape(1)
    amax = amax.reshape((1,) * (source.dim() - amax.dim()) + amax.shape)
    scale = back = torch.tensor(bound, device=amax.device) / amax
    if smallest <= _DEAD:
        dead = amax <= _DEAD
        scale, back = scale.masked_fill(dead, 0.0), scale.masked_fill(dead, 1.0)
    scale, back = (factor.expand(len(source), *factor.shape[1:]) for factor in (scale, back))

    target = torch.empty(source.shape, dtype=inputs.dtype, device=source.device)
    step = min(max(1, _PIECE * len(source) // source.numel()), len(source))
    values = torch.empty(step, *source.shape[1:], dtype=torch.float32, device=source.device)
    for start in range(0, len(source), step):
        rows = slice(start, min(start + step, len(source)))
        piece = values[: rows.stop - start]
        torch.mul(source[rows], scale[rows], out=piece).round_().clamp_(least, bound)
        torch.div(piece, back[rows], out=target[rows])
    return target.view(inputs.shape)
