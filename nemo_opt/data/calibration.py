"""Calibration batches: rows of whole documents without padding (`pack`), or one document a row with padding that is masked (`pad`).

Decisions:
- pack: documents follow each other, each with its end-of-document token, which is data as in training. A document that reaches the end of
  a row is cut there; its rest begins the next row as a piece of its own. No token attends across pieces and positions restart with each:
  `cu_seqlens` holds their bounds, and `nemo_opt.training.forward` does what the layer spec needs. The last, incomplete row is left out.
- pad: a document longer than the row is cut. Padding repeats the document's own tokens, never the end-of-document token, and stands behind
  them, where causal attention hides it; `attention_mask` marks it, and calibration keeps it out of every statistic.
- Context parallelism gives each rank two zig-zag parts of every piece, so pieces are cut to a multiple of 2 * cp: a document loses at most
  2 * cp - 1 tokens at its end. `multiple` sets the same cut at another layout, for the same rows.
- No row is dropped to make ranks even: micro-batches are at most as large as asked for and equally many everywhere (expert parallel ranks
  need that), and the few places left over repeat rows that are masked from the statistics.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Literal

import nemo_opt._stack

import torch
from megatron.core import parallel_state

from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError, DataError

__all__ = ["Packing", "calibration_batches"]

type Packing = Literal["pack", "pad"]
"""How documents become rows."""

type Batch = dict[str, torch.Tensor | None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    tokens: list[int]
    """All tokens of the row, padding included."""
    lengths: list[int]
    """Of the pieces that attend to themselves; their sum is the row's length."""
    real: int
    """Tokens before the padding."""


@dataclass(frozen=True)
class _Plan:
    """Which rows form which micro-batch."""

    rows: int
    """Rows there are."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    steps: int
    """Micro-batches of each rank."""

    def places(self, dp_rank: int, dp_size: int) -> Iterator[list[int]]:
        """Places of this rank's micro-batches; one at or beyond `rows` is left over."""
        for step in range(self.steps):
            start = (step * dp_size + dp_rank) * self.micro_batch_size
            yield list(range(start, start + self.micro_batch_size))


def calibration_batches(
    documents: Iterable[str | Sequence[int]],
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    num_samples: int,
    micro_batch_size: int = 1,
    packing: Packing = "pack",
    dp_rank: int = 0,
    dp_size: int = 1,
    multiple: int | None = None,
) -> list[Batch]:
    """Up to `num_samples` rows over all data-parallel ranks, as this rank's micro-batches on its device.

    Args:
        documents: texts, or their token ids, as `megatron.core`'s IndexedDataset gives them; empty ones are skipped.
        tokenizer: encodes texts, and knows the end-of-document token, which is added where it is missing.
        seq_length: S, before context parallelism takes its part.
        num_samples: rows that are made at most; fewer are reported on the log.
        micro_batch_size: B at most. A last, smaller step would leave ranks idle, so rows are spread evenly over as many steps.
        packing: "pack" or "pad", see the module's decisions.
        dp_rank: this rank's place on the data-parallel axis.
        dp_size: ranks on that axis; each gets equally many batches of one shape.
        multiple: pieces of packed rows are cut to it; None for 1, or 2 * cp with context parallelism.

    Returns:
        batches of `tokens` and `position_ids` [B, S / cp]; `attention_mask` [B, S / cp], 1 for what statistics count, or None for all;
        `cu_seqlens` int32 [pieces + 1], the bounds of pieces in the B * S tokens, or None where each row is one piece.

    Raises:
        ConfigError: a size is not positive or does not divide, or the ranks do not fit.
        DataError: there is no row.

    """
    cp_rank, cp_size = _context_parallel()
    multiple = multiple or (1 if cp_size == 1 else 2 * cp_size)
    _check(seq_length, num_samples, micro_batch_size, dp_rank, dp_size, packing)
    if seq_length % multiple or multiple % (2 * cp_size if cp_size > 1 else 1):
        raise ConfigError(
            f"seq_length {seq_length} % multiple {multiple} != 0, or multiple % (2 * cp {cp_size}) != 0: "
            "each context-parallel rank takes two pieces of every sequence"
        )
    encoded = filter(None, (_encoded(document, tokenizer) for document in documents))
    made = _packed(encoded, seq_length, multiple) if packing == "pack" else _padded(encoded, seq_length)
    rows = list(islice(made, num_samples))
    _check_rows(rows, num_samples, seq_length, packing)
    steps = -(-len(rows) // (micro_batch_size * dp_size))
    plan = _Plan(len(rows), -(-len(rows) // (steps * dp_size)), steps)
    return [_batch(rows, places, cp_rank, cp_size) for places in plan.places(dp_rank, dp_size)]


def _check(seq_length: int, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, packing: str) -> None:
    if packing not in ("pack", "pad"):
        raise ConfigError(f"packing {packing!r} is unknown; known are ['pack', 'pad']")
    if min(seq_length, num_samples, micro_batch_size) < 1:
        raise ConfigError(f"seq_length {seq_length}, num_samples {num_samples}, micro_batch_size {micro_batch_size} must be positive")
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"dp_rank {dp_rank} must lie in 0..dp_size - 1 = {dp_size - 1}")


def _check_rows(rows: list[_Row], num_samples: int, seq_length: int, packing: str) -> None:
    if not rows:
        remedy = "give more text, a shorter seq_length, or packing='pad'" if packing == "pack" else "give text"
        raise DataError(f"no calibration sample of {seq_length} tokens, {num_samples} were asked for: {remedy}")
    if len(rows) < num_samples:
        _log.warning("calibrating with %d samples of %d tokens, %d were asked for", len(rows), seq_length, num_samples)


def _encoded(document: str | Sequence[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(document, str) and not document.strip():
        return []
    tokens = tokenizer.encode(document) if isinstance(document, str) else [int(token) for token in document]
    return tokens if not tokens or tokens[-1] == tokenizer.eod else [*tokens, tokenizer.eod]


def _packed(encoded: Iterable[list[int]], seq_length: int, multiple: int) -> Iterator[_Row]:
    tokens: list[int] = []
    lengths: list[int] = []
    for document in encoded:
        rest = document[: len(document) - len(document) % multiple]
        while rest:
            piece, rest = rest[: seq_length - len(tokens)], rest[seq_length - len(tokens) :]
            tokens += piece
            lengths.append(len(piece))
            if len(tokens) == seq_length:
                yield _Row(tokens, lengths, seq_length)
                tokens, lengths = [], []


def _padded(encoded: Iterable[list[int]], seq_length: int) -> Iterator[_Row]:
    for document in encoded:
        repeats = -(-seq_length // len(document))
        yield _Row((document * repeats)[:seq_length], [seq_length], min(len(document), seq_length))


def _batch(rows: list[_Row], places: list[int], cp_rank: int, cp_size: int) -> Batch:
    chosen = [rows[place % len(rows)] for place in places]
    own = torch.stack([_own_part(row.lengths, cp_rank, cp_size) for row in chosen])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row.lengths]) for row in chosen])
    real = torch.tensor([row.real if place < len(rows) else 0 for row, place in zip(chosen, places, strict=True)])
    counted = torch.arange(positions.shape[1]) < real[:, None]
    lengths = [length for row in chosen for length in row.lengths]
    batch: Batch = {
        "tokens": torch.tensor([row.tokens for row in chosen]).gather(1, own),
        "position_ids": positions.gather(1, own),
        "attention_mask": None if bool(counted.all()) else counted.gather(1, own).long(),
        "cu_seqlens": None if len(lengths) == len(chosen) else torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    }
    device = local_device()
    return {name: value.to(device) if value is not None else None for name, value in batch.items()}


def _own_part(lengths: list[int], cp_rank: int, cp_size: int) -> torch.Tensor:
    """Indices in a row of this context-parallel rank's tokens: of each piece two parts, mirrored."""
    if cp_size == 1:
        return torch.arange(sum(lengths))
    parts: list[torch.Tensor] = []
    for start, length in zip([0, *accumulate(lengths)], lengths, strict=False):
        size = length // (2 * cp_size)
        parts += [start + part * size + torch.arange(size) for part in (cp_rank, 2 * cp_size - 1 - cp_rank)]
    return torch.cat(parts)


def _context_parallel() -> tuple[int, int]:
    """(rank, size) on the context-parallel axis."""
    if not parallel_state.is_initialized():
        return 0, 1
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
