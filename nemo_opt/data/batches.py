"""Batches on the local device: what training, validation and calibration iterate over.

Decisions:
- Every step of the iteration consumes micro_batch_size * dp_size consecutive samples, rank r taking the r-th part. So a global batch
  holds the same samples for every number of data-parallel ranks, and a run resumes at `start_sample` = samples consumed so far.
- With context parallelism each rank gets its two zig-zag pieces of the sequence; the sequence dim of every tensor is then S / cp.
- Calibration reads packed rows (documents joined by the end-of-document token, as in training) and never padding: padding would enter every
  quantizer's range.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, cast

import nemo_opt._stack

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from nemo_opt.data.datasets import Dataset
from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError, DataError

__all__ = ["Batch", "batches", "calibration_batches", "cp_slice"]

type Batch = dict[str, torch.Tensor | None]
"""tokens, labels, loss_mask and position_ids of shape [B, S]; attention_mask is None. Calibration has no labels and no loss_mask."""

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_log = logging.getLogger(__name__)


def batches(
    dataset: Dataset, *, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1, start_sample: int = 0, slice_cp: bool = True
) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank, from `start_sample` to the end of the dataset (an incomplete last step is left out).

    Args:
        dataset: samples with tokens, labels, loss_mask and position_ids, each [S].
        micro_batch_size: B.
        dp_rank: this rank's place on the data-parallel axis.
        dp_size: ranks on the data-parallel axis.
        start_sample: samples that all ranks together have consumed; a multiple of micro_batch_size * dp_size.
        slice_cp: give each context-parallel rank its part of the sequence.

    Raises:
        ConfigError: the ranks or the start do not fit.
        DataError: no complete step is left.
    """
    step = _check_sharding(micro_batch_size, dp_rank, dp_size)
    size = len(dataset)  # type: ignore[arg-type]
    if start_sample < 0 or start_sample % step:
        raise ConfigError(f"start_sample {start_sample} % (micro_batch_size {micro_batch_size} * dp_size {dp_size}) != 0")
    if start_sample + step > size:
        raise DataError(f"the dataset has {size} samples, none left for a step of {step} from sample {start_sample}; build it larger")
    starts = range(start_sample + dp_rank * micro_batch_size, size - size % step + dp_rank * micro_batch_size, step)
    return _generate(dataset, starts, micro_batch_size, slice_cp)


def calibration_batches(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    num_samples: int,
    micro_batch_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    slice_cp: bool = True,
) -> list[Batch]:
    """Up to `num_samples` full rows of packed documents (over all ranks), as this rank's micro-batches of tokens and position_ids.

    Fewer rows than asked for are reported on the log; every rank gets the same number of batches.

    Raises:
        ConfigError: a size is not positive or the ranks do not fit.
        DataError: the documents do not fill one micro-batch for every rank.
    """
    step = _check_sharding(micro_batch_size, dp_rank, dp_size)
    if seq_length < 1 or num_samples < 1:
        raise ConfigError(f"seq_length {seq_length} and num_samples {num_samples} must be positive")
    rows = _packed_rows(documents, tokenizer, seq_length, num_samples)
    usable = len(rows) - len(rows) % step
    if not usable:
        raise DataError(
            f"{len(rows)} calibration samples of {seq_length} tokens, one step needs micro_batch_size {micro_batch_size} * "
            f"dp_size {dp_size} = {step}; give more text, a shorter seq_length or a smaller micro-batch"
        )
    if usable < num_samples:
        _log.warning("calibrating with %d samples of %d tokens, %d were asked for", usable, seq_length, num_samples)
    tokens = torch.tensor(rows[:usable]).view(-1, dp_size, micro_batch_size, seq_length)[:, dp_rank]
    positions = torch.arange(seq_length).expand(micro_batch_size, seq_length)
    return [_on_device({"tokens": part, "position_ids": positions, "attention_mask": None}, slice_cp) for part in tokens]


def cp_slice(batch: Batch) -> Batch:
    """The two zig-zag pieces of the sequence that belong to this context-parallel rank; the batch itself without context parallelism.

    Raises:
        ConfigError: the sequence does not divide into 2 * cp pieces.
    """
    if not parallel_state.is_initialized() or (size := parallel_state.get_context_parallel_world_size()) == 1:
        return batch
    seq_length = cast(torch.Tensor, batch["tokens"]).shape[1]
    if seq_length % (2 * size):
        raise ConfigError(f"seq_length {seq_length} % (2 * cp {size}) != 0; each context-parallel rank takes two pieces of the sequence")
    group = parallel_state.get_context_parallel_group()
    sliced = get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)
    return {name: value.contiguous() if value is not None else None for name, value in sliced.items()}


def _check_sharding(micro_batch_size: int, dp_rank: int, dp_size: int) -> int:
    """Samples that all ranks consume in one step."""
    if micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ConfigError(f"micro_batch_size {micro_batch_size} must be positive and dp_rank {dp_rank} in 0..dp_size - 1 = {dp_size - 1}")
    return micro_batch_size * dp_size


def _generate(dataset: Dataset, starts: range, micro_batch_size: int, slice_cp: bool) -> Iterator[Batch]:
    for start in starts:
        samples: list[dict[str, Any]] = [dataset[index] for index in range(start, start + micro_batch_size)]
        batch: Batch = {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}
        yield _on_device(batch | {"attention_mask": None}, slice_cp)


def _on_device(batch: Batch, slice_cp: bool) -> Batch:
    device = local_device()
    sliced = cp_slice(batch) if slice_cp else batch
    return {name: value.to(device) if value is not None else None for name, value in sliced.items()}


def _packed_rows(documents: Iterable[str], tokenizer: Tokenizer, seq_length: int, num_samples: int) -> list[list[int]]:
    stream = chain.from_iterable([*tokenizer.encode(document), tokenizer.eod] for document in documents if document.strip())
    rows: list[list[int]] = []
    while len(rows) < num_samples and len(row := list(islice(stream, seq_length))) == seq_length:
        rows.append(row)
    return rows
