"""The distillation loss in the form of `nemo_opt.training.losses`.

ModelOpt's losses come per token, [B, S], with two marks: `tp_reduce` (each tensor-parallel rank holds the part of its vocabulary) and
`is_sequence_parallel` (each holds the part of its sequence). They are reduced to one number a micro-batch so that
- its value is the mean over valid tokens of the whole micro-batch, on every tensor- and context-parallel rank: the balancer's ratios are
  then the same at every layout;
- its gradient is that of this rank's own part: Megatron-Core adds the parts in the backward pass, as it does for the language model's loss.
The sum of that mean over this rank's tokens is handed back, as every loss function here does.
"""

from collections.abc import Callable
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.distill.adjust import distillation_model, teacher_runs
from nemo_opt.distill.criterion import LogitsDivergence
from nemo_opt.errors import ConfigError
from nemo_opt.training.losses import Batch, Metrics, language_model_loss, masked_sum

__all__ = ["cause_of_divergence", "distillation_loss_fn"]


def distillation_loss_fn(model: Any, batch: Batch) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Metrics]]:
    """Loss of a training pass of student and teacher; the language model's where the student ran alone (evaluation).

    Raises:
        ConfigError: `model` is no distillation model.

    """
    inner = distillation_model(model)
    if inner is None:
        raise ConfigError(f"{type(model).__name__} is not a distillation model: use convert_to_distillation_model, or another loss")
    if not teacher_runs(inner):
        return language_model_loss(model, batch)
    loss_mask = batch["loss_mask"]
    assert loss_mask is not None

    def reduce(lm_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        count = loss_mask.float().sum()
        whole_count = _sum_over(count, parallel_state.get_context_parallel_group())

        def mean(losses: Any) -> torch.Tensor:
            return _mean(losses, loss_mask, whole_count)

        balanced = inner.compute_kd_loss(student_loss=mean(lm_losses), loss_reduction_fn=mean)
        parts = balanced if isinstance(balanced, dict) else {"kd_loss": balanced}
        metrics = {name: torch.stack([value.detach() * count, count]) for name, value in parts.items()}
        metrics["loss"] = metrics["kd_loss"]
        return parts["kd_loss"] * whole_count, count.to(torch.int), metrics

    return reduce


def cause_of_divergence(chunks: Any) -> str | None:
    """What on this rank made the loss infinite or NaN, as far as the logits tell; for the error of a training that ends so."""
    model = distillation_model(chunks)
    losses = () if model is None else model._layers_to_loss.values()
    seen = [loss.finite.tolist() for loss in losses if isinstance(loss, LogitsDivergence) and loss.finite is not None]
    wrong = [role for index, role in enumerate(("student", "teacher")) if not all(finite[index] for finite in seen)]
    return f"the logits of the {' and the '.join(wrong)} are not finite" if wrong else None


def _mean(losses: Any, loss_mask: torch.Tensor, whole_count: torch.Tensor) -> torch.Tensor:
    """Mean over the micro-batch's valid tokens; the gradient is this rank's part of the sum over them, divided by their number."""
    losses_BS, tp_reduce, sequence_parallel = losses if isinstance(losses, tuple) else (losses, False, False)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    mask = loss_mask.chunk(tp_group.size(), dim=1)[tp_group.rank()] if sequence_parallel else loss_mask
    own, _ = masked_sum(losses_BS, mask)
    whole = own.detach()
    if tp_reduce or sequence_parallel:
        whole = _sum_over(whole, tp_group)
    whole = _sum_over(whole, parallel_state.get_context_parallel_group())
    return (own + (whole - own).detach()) / whole_count.clamp(min=1)


def _sum_over(value: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum over the ranks of a group, outside of the autograd graph."""
    total = value.detach().clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
