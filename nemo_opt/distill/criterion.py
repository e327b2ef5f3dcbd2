"""The losses of a distillation as ModelOpt modules: that of the logits, and how all are weighed. Hidden states: `hidden` and `relay`.

Decisions:
- Logits are compared by our own divergences. ModelOpt's loss holds seven copies of the logits, and its top-k loss has a gradient TP times
  too large.
- The balancer never divides by a loss that may be zero: with teacher == student both are, and rounding can make them negative.
"""

from typing import Any

import nemo_opt._stack

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from modelopt.torch.distill.plugins import megatron as plugin

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.divergence import divergence
from nemo_opt.distill.top_k import largest_logits

__all__ = ["Criterion", "LogitsDivergence", "LossBalancer", "build_criterion"]

type Criterion = dict[tuple[str, str], torch.nn.Module]

_NOISE = 1e-6
"""Losses below are rounding: of a teacher that is the student, 1e-7 at most was seen in float32. Scaling them up would train on noise."""


class LossBalancer(mtd.DistillationLossBalancer):
    """NeMo's weighing: hidden-state losses are scaled to the logits' loss, and both to the language model's if that one counts.

    Scales are detached: they weigh gradients, they have none.
    """

    def __init__(self, *, kd_loss_scale: float = 1.0, skip_lm_loss: bool = True) -> None:
        super().__init__()
        self.kd_loss_scale = kd_loss_scale
        self.skip_lm_loss = skip_lm_loss

    def forward(self, loss_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Total and parts of scalar losses.

        Args:
            loss_dict: by class of the loss as ModelOpt names it, and the language model's under ModelOpt's student key.

        Returns:
            `kd_loss` (the total to minimise), `logits_loss`, `intermediate_loss` (mean of the pairs, not scaled) and, where it counts,
            `lm_loss`.

        """
        losses = dict(loss_dict)
        lm_loss = losses.pop(STUDENT_LOSS_KEY, None)
        logits = sum_of([losses.pop(name) for name in list(losses) if "Logits" in name])
        hidden = sum_of(list(losses.values())) / max(len(losses), 1)
        total = logits + hidden * _ratio(logits, hidden) if losses else logits
        parts = {"logits_loss": logits, "intermediate_loss": torch.as_tensor(hidden, device=logits.device)}
        if not self.skip_lm_loss and lm_loss is not None:
            parts["lm_loss"] = lm_loss
            total = lm_loss + total * _ratio(lm_loss, total) * self.kd_loss_scale
        return {"kd_loss": total, **parts}


class LogitsDivergence(plugin.BaseLoss):  # type: ignore[misc]
    """The divergence of the teacher's and the student's next-token distributions, in the form of ModelOpt's `LogitsKLLoss`."""

    def __init__(self, config: DistillationConfig, student: TransformerConfig, vocab_size: int | None) -> None:
        super().__init__(student)
        self.settings = config
        self.vocab_size = vocab_size
        self.finite: torch.Tensor | None = None
        """Whether all logits of student and teacher that this rank has seen were finite numbers, [2]."""

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        """Losses [B, S] of logits [S, B, V / TP], the same on all tensor-parallel ranks. The teacher's logits are overwritten.

        Raises:
            ConfigError: the shapes differ.

        """
        student, teacher = self.pre_forward(predictions, targets)
        if self.finite is None:
            self.finite = torch.ones(2, dtype=torch.bool, device=student.device)
        temperature, kind = float(self.settings.logit_kl_temperature), self.settings.logit_loss
        whole = {"vocab_size": self.vocab_size, "group": parallel_state.get_tensor_model_parallel_group()}
        if self.settings.logit_kl_topk is None:
            losses = divergence(student, teacher, kind=kind, temperature=temperature, overwrite_teacher=True, finite=self.finite, **whole)
        else:
            candidates = largest_logits(student, teacher, self.settings.logit_kl_topk, **whole)
            losses = divergence(*candidates, kind=kind, temperature=temperature, finite=self.finite)
        if self.settings.logit_kl_scale_by_temperature_squared:
            losses = losses * temperature**2
        return self.post_forward(losses)


def build_criterion(config: DistillationConfig, student: TransformerConfig, *, vocab_size: int | None = None) -> Criterion:
    """What `modelopt.torch.distill.convert` is given: the loss on logits, or the caller's own losses; {} but on the last pipeline stage.

    `adjust_distillation_model_for_mcore` adds the losses of pairs of hidden states, which may lie on any stage.

    Args:
        config: What is compared, and how.
        student: Megatron-Core's configuration of the student.
        vocab_size: Tokens of the vocabulary without its padding, which is not compared; None: all.

    """
    if not parallel_state.is_pipeline_last_stage():
        return {}
    if config.criterion is not None:
        return dict(config.criterion)
    return {("output_layer", "output_layer"): LogitsDivergence(config, student, vocab_size)}


def sum_of(losses: list[torch.Tensor]) -> Any:
    """The sum; 0.0 for none."""
    return sum(losses[1:], start=losses[0]) if losses else 0.0


def _ratio(target: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """What scales `loss` to the size of `target`; 1 where there is nothing to scale, never negative."""
    target, loss = target.detach(), loss.detach()
    return torch.where((loss > _NOISE) & (target > 0), target / loss.clamp(min=_NOISE), torch.ones_like(loss))
