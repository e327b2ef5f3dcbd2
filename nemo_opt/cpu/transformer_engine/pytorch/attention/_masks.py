"""Which keys each query may see, from mask type, sliding window, positions and padding."""

import torch

from nemo_opt.errors import ConfigError

__all__ = ["MASK_TYPES", "combine", "normalise_mask_type", "padding_allowed", "padding_of_bounds", "position_allowed", "window_of"]

MASK_TYPES = ("no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right", "arbitrary")


def normalise_mask_type(mask_type: str) -> str:
    """One spelling for each mask type.

    Raises:
        ConfigError: there is no such type.
    """
    name = mask_type.replace(",", "_")
    name = "padding_causal" if name == "causal_padding" else name
    if name not in MASK_TYPES:
        raise ConfigError(f"attn_mask_type={mask_type!r} is unknown; there are {', '.join(MASK_TYPES)}.")
    return name


def window_of(mask_type: str, window_size: tuple[int, int] | list[int] | None) -> tuple[int, int]:
    """(positions to the left, positions to the right) a query sees besides its own; -1 is no limit, and causal masks see none to the right.

    Raises:
        ConfigError: a negative number other than -1.
    """
    left, right = (-1, -1) if window_size is None else (int(window_size[0]), int(window_size[1]))
    if min(left, right) < -1:
        raise ConfigError(f"window_size={(left, right)}: each side is -1 (no limit) or a number of positions.")
    return (left, 0) if "causal" in mask_type else (left, right)


def position_allowed(query_positions: torch.Tensor, key_positions: torch.Tensor, window: tuple[int, int]) -> torch.Tensor | None:
    """[Sq, Sk] whether a key lies in the query's window, or None if all do."""
    left, right = window
    if left < 0 and right < 0:
        return None
    distance = key_positions[None, :] - query_positions[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed


def padding_allowed(mask: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[B, 1, Sq, Sk] whether query and key both are tokens.

    Args:
        mask: True marks padding: [B, 1, 1, S] for queries and keys alike, a pair of such for each, or [B, 1, Sq, Sk] for pairs.
    """
    if isinstance(mask, tuple | list):
        query_padding, key_padding = mask
    elif mask.shape[-2] != 1:
        return ~mask
    else:
        query_padding = key_padding = mask
    return ~(query_padding.transpose(-1, -2) | key_padding)


def padding_of_bounds(
    query: torch.Tensor | None, key: torch.Tensor | None, num_queries: int, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding masks ([B, 1, 1, Sq], [B, 1, 1, Sk]) of sequences that start at their row's first token.

    Args:
        query: [B + 1] bounds of the queries' tokens.
        key: [B + 1] bounds of the keys' tokens.
        num_queries: Sq.
        num_keys: Sk.

    Raises:
        ConfigError: bounds are missing.
    """
    if query is None or key is None:
        raise ConfigError("A padding mask needs attention_mask, or cu_seqlens_q and cu_seqlens_kv.")
    return _beyond(query, num_queries), _beyond(key, num_keys)


def _beyond(bounds: torch.Tensor, size: int) -> torch.Tensor:
    return (torch.arange(size)[None, :] >= (bounds[1:] - bounds[:-1])[:, None])[:, None, None, :]


def combine(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """Allowed by both; None allows all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second
