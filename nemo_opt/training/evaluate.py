"""Validation loss: the mean over valid tokens in nats, the same on every rank."""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import nemo_opt._stack

from megatron.core.utils import get_model_config

from nemo_opt.errors import DataError
from nemo_opt.training.losses import Batch, LossFunction
from nemo_opt.training.rounding import rounded_once
from nemo_opt.training.step import MegatronStep

__all__ = ["evaluate", "evaluate_metrics"]


def evaluate(
    chunks: Any, batches: Iterable[Batch], num_batches: int, *, loss_fn: LossFunction | None = None, model: str = "the model"
) -> float:
    """Mean loss (nats per valid token) over `num_batches` micro-batches of each data parallel rank. Collective.

    Raises:
        DataError: There are fewer batches, no valid token in them, or the loss is not finite; calls the model what `model` says.

    """
    metrics = evaluate_metrics(chunks, batches, num_batches, loss_fn=loss_fn)
    loss = metrics["loss"]
    if not math.isfinite(loss):
        raise DataError(f"the loss of {model} over {num_batches} validation batches is {loss}: they hold no valid token, or it is broken")
    return loss


def evaluate_metrics(chunks: Any, batches: Iterable[Batch], num_batches: int, *, loss_fn: LossFunction | None = None) -> dict[str, float]:
    """All metrics of the loss function in evaluation mode, without gradients; training mode is restored. Collective."""
    chunks = chunks if isinstance(chunks, list) else [chunks]
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise DataError("there is no validation batch: provide more samples or a larger validation split")
    size, seq_length = _batch_shape(first, chunks[0])
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        step = MegatronStep(
            model=chunks,
            data_iterator=chain([first], iterator),
            loss_fn=loss_fn,
            seq_length=seq_length,
            micro_batch_size=size,
            num_microbatches=num_batches,
            forward_only=True,
        )
        with rounded_once(chunks):
            return step()
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)


def _batch_shape(batch: Batch, chunk: Any) -> tuple[int, int]:
    tokens = batch["tokens"]
    assert tokens is not None
    return tokens.shape[0], tokens.shape[1] * get_model_config(chunk).context_parallel_size
