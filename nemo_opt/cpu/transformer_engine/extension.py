"""The functions of `transformer_engine_torch` (the compiled extension) that Megatron-Core calls."""

import torch

__all__ = ["thd_get_partitioned_indices"]


def thd_get_partitioned_indices(cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int) -> torch.Tensor:
    """Positions of one context-parallel rank's tokens in a packed batch.

    Each sequence is cut into `2 * world_size` equal chunks; the rank takes chunks `rank` and `2 * world_size - 1 - rank`.

    Args:
        cu_seqlens: [N + 1] starts of the N sequences and the end of the last; each length divisible by `2 * world_size`.
        total_tokens: tokens in the batch.
        world_size: context-parallel ranks.
        rank: the rank asked for.

    Returns:
        [total_tokens / world_size] int32 positions.
    """
    if world_size == 1:
        return torch.arange(total_tokens, dtype=torch.int32)
    pieces: list[torch.Tensor] = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        if (end - start) % (2 * world_size):
            raise ValueError(f"A packed sequence of {end - start} tokens cannot be cut into 2 * {world_size} equal chunks; pad it.")
        chunk = (end - start) // (2 * world_size)
        first_rows = (start + index * chunk for index in (rank, 2 * world_size - 1 - rank))
        pieces.extend(torch.arange(first, first + chunk, dtype=torch.int32) for first in first_rows)
    return torch.cat(pieces)
