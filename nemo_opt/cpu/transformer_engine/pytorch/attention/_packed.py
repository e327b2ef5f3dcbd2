"""Attention within each of the sequences that are packed into one row of tokens ("thd"), whole or cut by context parallelism."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch.attention._core import CoreOptions, attend
from nemo_opt.cpu.transformer_engine.pytorch.attention._masks import combine, position_allowed
from nemo_opt.cpu.transformer_engine.pytorch.attention._positions import gather_sequence, rank_positions
from nemo_opt.errors import ConfigError

__all__ = ["PackedBounds", "attend_packed"]


@dataclass(frozen=True, kw_only=True)
class PackedBounds:
    """[N + 1] bounds of N sequences, counted before context parallelism cuts them."""

    query: torch.Tensor | None
    """Of the queries, padding not counted."""

    key: torch.Tensor | None
    """Of the keys, padding not counted."""

    query_padded: torch.Tensor | None
    """Of the queries with padding; None if there is none."""

    key_padded: torch.Tensor | None
    """Of the keys with padding; None if there is none."""


@dataclass(frozen=True)
class _Sequence:
    """Where one sequence lies on this rank, and how many tokens it has on all ranks without padding."""

    start: int
    rows: int
    tokens: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.rows)


def _sequences(bounds: torch.Tensor | None, padded: torch.Tensor | None, ranks: int) -> list[_Sequence]:
    if bounds is None:
        raise ConfigError('qkv_format="thd" needs cu_seqlens_q and cu_seqlens_kv.')
    edges = (bounds if padded is None else padded).tolist()
    tokens = (bounds[1:] - bounds[:-1]).tolist()
    return [_Sequence(start // ranks, (end - start) // ranks, n) for start, end, n in zip(edges[:-1], edges[1:], tokens, strict=True)]


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: PackedBounds,
    options: CoreOptions,
    *,
    window: tuple[int, int],
    bottom_right: bool,
    group: ProcessGroup | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Attend.

    Args:
        query: [T, H, D].
        key: [T, G, D].
        value: [T, G, Dv].
        bounds: of the sequences.
        options: of the attention.
        window: positions to the left and right a query sees.
        bottom_right: align the window to the last query and key of each sequence instead of the first.
        group: context-parallel ranks, or None.

    Returns:
        ([T, H * Dv], zero for tokens between sequences; the largest scores of each head, by sequence, if asked for).

    Raises:
        ConfigError: bounds are missing, or a sequence cannot be cut.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if group is not None:
        key, value = gather_sequence(key, value, group)
    shards = list(zip(key.chunk(ranks), value.chunk(ranks), strict=True))
    pieces: list[torch.Tensor] = []
    maxima: list[torch.Tensor] = []
    end = 0
    for q, k in zip(_sequences(bounds.query, bounds.query_padded, ranks), _sequences(bounds.key, bounds.key_padded, ranks), strict=True):
        pieces.append(_blank(query, value, q.start - end))
        end = q.start + q.rows
        if not q.rows:
            continue
        own_key = torch.cat([shard[0][k.slice] for shard in shards])
        own_value = torch.cat([shard[1][k.slice] for shard in shards])
        query_positions = rank_positions(q.rows * ranks, ranks, rank)
        key_positions = torch.cat([rank_positions(k.rows * ranks, ranks, r) for r in range(ranks)])
        allowed = position_allowed(query_positions + (k.tokens - q.tokens if bottom_right else 0), key_positions, window)
        if q.tokens != q.rows * ranks or k.tokens != k.rows * ranks:
            allowed = combine(allowed, (query_positions < q.tokens)[:, None] & (key_positions < k.tokens)[None, :])
        heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (query[q.slice], own_key, own_value)]
        out, largest = attend(heads_first[0], heads_first[1], heads_first[2], options, allowed=allowed)
        pieces.append(out[0].transpose(0, 1).flatten(1))
        maxima.extend([] if largest is None else [largest])
    pieces.append(_blank(query, value, query.shape[0] - end))
    return torch.cat(pieces), maxima


def _blank(query: torch.Tensor, value: torch.Tensor, rows: int) -> torch.Tensor:
    """Output rows of tokens between sequences."""
    return query.new_zeros(rows, query.shape[1] * value.shape[-1])
