"""Forward passes for their activations: micro-batches through mcore's own schedule, without loss or gradient, on any layout.

What calibration and importance scores need. Decisions:
- One schedule call carries all micro-batches of one shape, so pipeline stages overlap; no labels are passed and no logits leave the last
  stage. With `skip_head` they are not even made.
- Batches are kept (tokens only), since ModelOpt may run a loop several times.
- Documents that share a row (`cu_seqlens`) attend to themselves only: under the TE spec all rows of a micro-batch become one packed
  sequence ("thd"), which Transformer Engine cuts by context parallelism too; the local attention gets a block-diagonal causal mask.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from nemo_opt.errors import DataError
from nemo_opt.models.sizes import spec_of

__all__ = ["Batch", "ForwardLoop", "Surround", "forward_loop", "tokens_in_order"]

Batch = Mapping[str, torch.Tensor | None]
"""tokens and position_ids, both [B, S] (S: of this context-parallel rank), on the local device. Optionally attention_mask: [B, S] with 1
for real tokens, padding standing behind them, or mcore's [B, 1, S, S]; and cu_seqlens, int32 [N + 1]: bounds of the documents in the rows
laid end to end, before context parallelism."""
ForwardLoop = Callable[[torch.nn.Module], None]
"""What ModelOpt calls with the model to show it data."""
Surround = Callable[[torch.nn.Module, Batch], AbstractContextManager[object]]
"""Context under which a chunk of the model runs on a micro-batch."""


def forward_loop(
    batches: Iterable[Batch], *, description: str, surround: Surround = lambda *_: nullcontext(), skip_head: bool = False
) -> ForwardLoop:
    """A loop that shows `batches` to the model it is called with; making it and calling it are collective.

    Args:
        batches: this data-parallel rank's micro-batches, the same ones on each of its tensor and pipeline parallel ranks.
        description: shown beside the progress bar (rank 0, only on a terminal).
        surround: entered around each micro-batch, on every stage.
        skip_head: leave out the output layer of a GPTModel.

    Raises:
        DataError: on every rank, if any rank has no batch or ranks of one data-parallel rank disagree.

    """
    kept = list(batches)
    _check_on_all_ranks([_shape(batch) for batch in kept])
    options = {"output_processor": _hidden_states} if skip_head else {}

    def loop(model: torch.nn.Module) -> None:
        with torch.no_grad(), _progress(len(kept), description) as advance:
            for _, group in groupby(kept, key=lambda batch: (_shape(batch), _is_packed(batch))):
                _run_schedule(model, list(group), surround, options, advance)

    return loop


def tokens_in_order(chunk: torch.nn.Module, batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Values [B, S] of tokens as the decoder has them: [S, B], or [B * S, 1] where a micro-batch is one packed sequence."""
    return values.reshape(-1, 1) if _is_flat(chunk, batch) else values.transpose(0, 1)


def _run_schedule(
    model: torch.nn.Module, batches: list[Batch], surround: Surround, options: dict[str, Any], advance: Callable[[], object]
) -> None:
    """All of `batches`, which have one shape, in one forward-only call of mcore's schedule."""
    micro_batch_size, seq_length = _shape(batches[0])
    if _is_flat(model, batches[0]):
        micro_batch_size, seq_length = 1, micro_batch_size * seq_length

    def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(iterator)
        advance()
        with surround(chunk, batch):
            return _forward(chunk, batch, options), _no_loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length * parallel_state.get_context_parallel_world_size(),  # the schedule divides it again
        micro_batch_size=micro_batch_size,
        forward_only=True,
    )


def _forward(chunk: torch.nn.Module, batch: Batch, options: dict[str, Any]) -> torch.Tensor:
    tokens_BS, positions_BS, bounds = _required(batch, "tokens"), _required(batch, "position_ids"), batch.get("cu_seqlens")
    mask = batch.get("attention_mask")
    mask = None if mask is not None and mask.dim() == 2 else mask  # padding stands behind the tokens: causal attention does not see it
    output: torch.Tensor
    if bounds is None:
        output = chunk(tokens_BS, positions_BS, mask, **options)
    elif _is_flat(chunk, batch):
        longest = tokens_BS.shape[1] * parallel_state.get_context_parallel_world_size()
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        output = chunk(tokens_BS.reshape(1, -1), positions_BS.reshape(1, -1), None, packed_seq_params=packed, **options)
    else:
        output = chunk(tokens_BS, positions_BS, _block_diagonal(bounds, *tokens_BS.shape), **options)
    return output


def _block_diagonal(bounds: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """[B, 1, S, S], True where attention is masked: later tokens, and those of other documents."""
    places = torch.arange(rows * length, device=bounds.device)
    document_BS = torch.bucketize(places, bounds, right=True).view(rows, length)
    same = document_BS[:, :, None] == document_BS[:, None, :]
    return ~same.tril()[:, None]


def _is_packed(batch: Batch) -> bool:
    return batch.get("cu_seqlens") is not None


def _is_flat(model: Any, batch: Batch) -> bool:
    """Whether the micro-batch goes through the model as one packed sequence."""
    return _is_packed(batch) and spec_of(model) == "te"


def _hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """What GPTModel returns in place of logits."""
    return hidden_states


def _no_loss(output_tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return output_tensor.new_zeros(()), {}


def _required(batch: Batch, name: str) -> torch.Tensor:
    value = batch[name]
    assert value is not None, f"a batch without {name}"
    return value


def _shape(batch: Batch) -> tuple[int, int]:
    tokens_BS = _required(batch, "tokens")
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
