"""Batches on the local device: what training and validation iterate over.

Decisions:
- Every step of the iteration consumes micro_batch_size * dp_size consecutive samples, rank r taking the r-th part. So a global batch
  holds the same samples for every number of data-parallel ranks, and a run resumes at `start_sample` = samples consumed so far.
- With context parallelism each rank gets its two zig-zag pieces of the sequence; the sequence dim of every tensor is then S / cp.
- Calibration has batches of its own (`nemo_opt.data.calibration`), which keep documents apart.
"""

from collections.abc import Iterator
from typing import Any, cast

import nemo_opt._stack

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from nemo_opt.data.datasets import Dataset
from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError, DataError

__all__ = ["Batch", "batches", "cp_slice"]

type Batch = dict[str, torch.Tensor | None]
"""tokens, labels, loss_mask and position_ids of shape [B, S]; attention_mask is None."""

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


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
