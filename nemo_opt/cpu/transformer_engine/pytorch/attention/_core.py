"""softmax(Q K^T) V for one rectangle of queries and keys."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

__all__ = ["CoreOptions", "attend"]


@dataclass(frozen=True, kw_only=True)
class CoreOptions:
    """What stays the same for all rectangles of a call."""

    scale: float
    """Factor of the scores."""

    dropout: float
    """Probability to drop a weight."""

    rng: Callable[[], AbstractContextManager[Any]]
    """Context under whose random state dropout is drawn."""

    offset: torch.Tensor | None
    """[H] scores of a key without a value, which takes part in the softmax; None for no such key."""

    want_max: bool
    """Also find the largest score of each head."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: CoreOptions,
    *,
    allowed: torch.Tensor | None = None,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention; a query that may see no key gets zeros and no gradient.

    Args:
        query: [B, H, Sq, D].
        key: [B, G, Sk, D], G divides H.
        value: [B, G, Sk, Dv].
        options: what stays the same for all calls.
        allowed: broadcast to [B, H, Sq, Sk], what may be seen; None for all.
        causal: query i sees keys 0 to i; then `allowed` and `bias` are None.
        bias: broadcast to [B, H, Sq, Sk], added to the scaled scores.

    Returns:
        ([B, H, Sq, Dv], [H] or None).
    """
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sees_any = None if allowed is None else allowed.any(-1, keepdim=True)
    if sees_any is not None and bool(sees_any.all()):
        sees_any = None
    seen = allowed
    if allowed is not None and sees_any is not None:
        allowed = allowed | ~sees_any
    explicit = options.offset is not None or options.want_max
    with options.rng() if options.dropout > 0 else nullcontext():
        if explicit:
            out, largest = _explicit(query, key, value, options, _scores_mask(allowed, causal, query, key), bias, seen)
        else:
            mask = allowed
            if bias is not None:
                mask = bias.to(query.dtype) if allowed is None else bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
            largest = None
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=options.dropout, is_causal=causal, scale=options.scale
            )
    return out if sees_any is None else out * sees_any, largest


def _scores_mask(allowed: torch.Tensor | None, causal: bool, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril() if causal else allowed


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: CoreOptions,
    allowed: torch.Tensor | None,
    bias: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same, written out, for what torch's own attention does not offer; softmax in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(wide) * options.scale
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    largest = None
    if options.want_max:
        real = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
        largest = real.amax(dim=(0, 2, 3))
    if options.offset is not None:
        sink = options.offset.to(wide).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    weights = functional.dropout(weights, options.dropout, training=options.dropout > 0)
    return weights @ value, largest
