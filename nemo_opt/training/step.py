"""One pass of micro-batches through Megatron-Core's schedule: `MegatronStep`, under the name of NeMo's class.

It gives every virtual chunk the same micro-batches, hands pipeline schedules the tensor shapes that distillation needs, and turns the
last stage's sums into means that are the same on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.training.losses import Batch, LossFunction, Metrics, language_model_loss

__all__ = ["MegatronStep"]


class MegatronStep:
    """A callable that runs `num_microbatches` forward (and backward) passes and returns the metrics of them all.

    Args:
        model: The chunks of this rank, or one chunk.
        data_iterator: Micro-batches of this data parallel rank; the same on every rank of one model copy.
        loss_fn: See `nemo_opt.training.losses`; the language model's cross-entropy where None.
        seq_length: S of the whole sequence, before context parallelism splits it.
        micro_batch_size: B.
        num_microbatches: Micro-batches taken from the iterator at each call.
        decoder_seq_length: For Megatron-Core's encoder-decoder models.
        forward_only: No gradients.

    """

    def __init__(
        self,
        *,
        model: Any,
        data_iterator: Iterator[Batch],
        loss_fn: LossFunction | None = None,
        seq_length: int,
        micro_batch_size: int,
        num_microbatches: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
    ) -> None:
        self.model: list[Any] = model if isinstance(model, list) else [model]
        self.data_iterator = data_iterator
        self.loss_fn = loss_fn or language_model_loss
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.num_microbatches = num_microbatches
        self.decoder_seq_length = decoder_seq_length
        self.forward_only = forward_only
        self.local_loss_is_finite = True
        """Whether every loss that this rank computed in the last call was a finite number."""
        if num_microbatches < 1:
            raise ConfigError(f"num_microbatches must be positive, got {num_microbatches}")

    @property
    def adjust_tensor_shapes_fn(self) -> Callable[..., Any] | None:
        """Changes the shapes that pipeline stages exchange, for a student and a teacher in one model; None for any other model."""
        from nemo_opt.distill import get_tensor_shapes_adjust_fn_for_distillation

        return get_tensor_shapes_adjust_fn_for_distillation(
            self.model, self.seq_length, self.micro_batch_size, self.decoder_seq_length, self.forward_only
        )

    def __call__(self) -> dict[str, float]:
        """Run the micro-batches; returns each metric's mean over all tokens of all ranks, equal on every rank.

        Raises:
            DataError: The iterator ended.

        """
        micro_batches = list(islice(self.data_iterator, self.num_microbatches))
        if len(micro_batches) < self.num_microbatches:
            raise DataError(f"the data ended after {len(micro_batches)} of {self.num_microbatches} micro-batches: provide more samples")
        outputs = self._run(micro_batches)
        self.local_loss_is_finite = all(torch.isfinite(pair).all().item() for output in outputs for pair in output.values())
        return _mean_over_ranks(outputs)

    def _run(self, micro_batches: list[Batch]) -> list[Metrics]:
        arguments: dict[str, Any] = {}
        if parallel_state.get_pipeline_model_parallel_world_size() > 1 and (adjust := self.adjust_tensor_shapes_fn) is not None:
            arguments["adjust_tensor_shapes_fn"] = adjust
        with torch.set_grad_enabled(not self.forward_only), _interleaved_groups(self.model, self.num_microbatches):
            return get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=[iter(micro_batches) for _ in self.model],
                model=self.model,
                num_microbatches=self.num_microbatches,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                decoder_seq_length=self.decoder_seq_length,
                forward_only=self.forward_only,
                **arguments,
            )

    def _forward_step(self, data_iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(data_iterator)
        output = model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])
        return output, self.loss_fn(model, batch)


@contextmanager
def _interleaved_groups(chunks: list[Any], num_microbatches: int) -> Iterator[None]:
    """The interleaved schedule takes micro-batches in groups of pp; where that leaves a rest, they all become one group."""
    if len(chunks) == 1:
        yield
        return
    config, pp = get_model_config(chunks[0]), parallel_state.get_pipeline_model_parallel_world_size()
    if num_microbatches < pp:
        raise ConfigError(f"{num_microbatches} micro-batches < pp {pp}, too few for interleaved stages: take more, or vp 1")
    group = config.microbatch_group_size_per_vp_stage
    config.microbatch_group_size_per_vp_stage = num_microbatches if num_microbatches % pp else pp
    try:
        yield
    finally:
        config.microbatch_group_size_per_vp_stage = group


def _mean_over_ranks(outputs: list[Metrics]) -> dict[str, float]:
    """Sums [sum, count] pairs over micro-batches, data and context parallel ranks, sends them from the last stage to all, divides."""
    names, totals = _sum_micro_batches(outputs)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    names, totals = _broadcast_from_last_stage(names, totals)
    return {name: (total / count if count else float("nan")) for name, (total, count) in zip(names, totals.tolist(), strict=True)}


def _sum_micro_batches(outputs: list[Metrics]) -> tuple[list[str], torch.Tensor]:
    if not outputs:  # not the last stage
        return [], torch.zeros(0, 2, dtype=torch.float64, device=local_device())
    names = sorted(outputs[0])
    pairs = [torch.stack([output[name].detach().to(local_device(), torch.float64) for name in names]) for output in outputs]
    return names, torch.stack(pairs).sum(dim=0)


def _broadcast_from_last_stage(names: list[str], totals: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return names, totals
    group, last = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_pipeline_model_parallel_last_rank()
    box: list[Any] = [(names, totals.cpu())]
    dist.broadcast_object_list(box, src=last, group=group, device=local_device())
    return box[0]
