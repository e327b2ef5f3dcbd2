"""Forward passes for their activations: micro-batches through mcore's own schedule, without loss or gradient, on any layout.

What calibration and importance scores need. Decisions: one schedule call carries all micro-batches of one shape, so pipeline stages
overlap; no labels are passed and no logits leave the last stage; batches are kept (tokens only), since ModelOpt may run a loop several
times.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from nemo_opt.errors import DataError

__all__ = ["Batch", "ForwardLoop", "forward_loop"]

Batch = Mapping[str, torch.Tensor | None]
"""tokens and position_ids, both [B, S], on the local device, optionally attention_mask and loss_mask."""
ForwardLoop = Callable[[torch.nn.Module], None]
"""What ModelOpt calls with the model to show it data."""


def forward_loop(batches: Iterable[Batch], *, description: str) -> ForwardLoop:
    """A loop that shows `batches` to the model it is called with; making it and calling it are collective.

    Args:
        batches: this data-parallel rank's micro-batches, the same ones on each of its tensor and pipeline parallel ranks.
        description: shown beside the progress bar (rank 0, only on a terminal).

    Raises:
        DataError: on every rank, if any rank has no batch or ranks of one data-parallel rank disagree.

    """
    kept = list(batches)
    _check_on_all_ranks([_shape(batch) for batch in kept])

    def loop(model: torch.nn.Module) -> None:
        with torch.no_grad(), _progress(len(kept), description) as advance:
            for (micro_batch_size, seq_length), group in groupby(kept, key=_shape):
                _run_schedule(model, list(group), micro_batch_size, seq_length, advance)

    return loop


def _run_schedule(
    model: torch.nn.Module, batches: list[Batch], micro_batch_size: int, seq_length: int, advance: Callable[[], object]
) -> None:
    """All of `batches`, which have one shape, in one forward-only call of mcore's schedule."""

    def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(iterator)
        advance()
        return chunk(batch["tokens"], batch["position_ids"], batch.get("attention_mask")), _no_loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length * parallel_state.get_context_parallel_world_size(),  # the schedule divides it again
        micro_batch_size=micro_batch_size,
        forward_only=True,
    )


def _no_loss(output_tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return output_tensor.new_zeros(()), {}


def _shape(batch: Batch) -> tuple[int, int]:
    tokens_BS = batch["tokens"]
    assert tokens_BS is not None
    return tokens_BS.shape[0], tokens_BS.shape[1]


def _check_on_all_ranks(shapes: list[tuple[int, int]]) -> None:
    """Raise everywhere when one rank's batches are unusable: an error on one rank alone would leave the others waiting."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (parallel_state.get_data_parallel_rank(), shapes))
    if empty := [rank for rank, (_, other) in enumerate(everyone) if not other]:
        raise DataError(f"no batches on ranks {empty} of {len(everyone)}: give each data-parallel rank at least one micro-batch")
    first: dict[int, tuple[int, list[Any]]] = {}
    for rank, (dp_rank, other) in enumerate(everyone):
        earlier, expected = first.setdefault(dp_rank, (rank, other))
        if other != expected:
            raise DataError(
                f"ranks {earlier} and {rank} work on the same data but got different batches ({len(expected)} and {len(other)}, "
                f"first shapes {expected[0]} and {other[0]}): give all ranks of one data-parallel rank the same"
            )


@contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[], object]]:
    """A progress bar on rank 0 of a terminal, else nothing; yields the function that moves it by one batch."""
    shown = dist.get_rank() == 0 and sys.stderr.isatty()
    with tqdm(total=total, desc=description, unit="batch", disable=not shown) as bar:
        yield bar.update
