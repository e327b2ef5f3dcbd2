"""The losses of a distillation as ModelOpt modules: logits, hidden states, and how they are weighed.

Decisions:
- Logits are compared by our own divergences. ModelOpt's loss holds seven copies of the logits, and its top-k loss has a gradient TP times
  too large. Hidden states are compared by ModelOpt's losses.
- Names of layers are translated to this pipeline stage here, since ModelOpt's own translation replaces every equal number in a name.
- A projection (student width -> teacher width) starts from one seed, or its copies on tensor- and data-parallel ranks would differ.
- The balancer never divides by a loss that may be zero: with teacher == student both are, and rounding can make them negative.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nemo_opt._stack

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from modelopt.torch.distill.loss_balancers import STUDENT_LOSS_KEY
from modelopt.torch.distill.plugins import megatron as plugin

from nemo_opt.device import local_device
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.divergence import divergence
from nemo_opt.distill.top_k import largest_logits
from nemo_opt.errors import ConfigError

__all__ = ["LogitsDivergence", "LossBalancer", "build_criterion", "local_layer_name"]

type Criterion = dict[tuple[str, str], torch.nn.Module]

_PROJECTION_SEED = 1234
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
            `kd_loss` (the total to minimise), `logits_loss` and `intermediate_loss` (mean of the pairs, not scaled).

        """
        losses = dict(loss_dict)
        lm_loss = losses.pop(STUDENT_LOSS_KEY, None)
        logits = sum_of([losses.pop(name) for name in list(losses) if "Logits" in name])
        hidden = sum_of(list(losses.values())) / max(len(losses), 1)
        total = logits + hidden * _ratio(logits, hidden) if losses else logits
        if not self.skip_lm_loss and lm_loss is not None:
            total = lm_loss + total * _ratio(lm_loss, total) * self.kd_loss_scale
        return {"kd_loss": total, "logits_loss": logits, "intermediate_loss": torch.as_tensor(hidden, device=logits.device)}


class LogitsDivergence(plugin.BaseLoss):  # type: ignore[misc]
    """The divergence of the teacher's and the student's next-token distributions, in the form of ModelOpt's `LogitsKLLoss`."""

    def __init__(self, config: DistillationConfig, student: TransformerConfig, vocab_size: int | None) -> None:
        super().__init__(student)
        self.settings = config
        self.vocab_size = vocab_size

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        """Losses [B, S] of logits [S, B, V / TP], the same on all tensor-parallel ranks. The teacher's logits are overwritten."""
        student, teacher = self.pre_forward(predictions, targets)
        temperature, kind = float(self.settings.logit_kl_temperature), self.settings.logit_loss
        whole = {"vocab_size": self.vocab_size, "group": parallel_state.get_tensor_model_parallel_group()}
        if self.settings.logit_kl_topk is None:
            losses = divergence(student, teacher, kind=kind, temperature=temperature, overwrite_teacher=True, **whole)
        else:
            candidates = largest_logits(student, teacher, self.settings.logit_kl_topk, **whole)
            losses = divergence(*candidates, kind=kind, temperature=temperature)
        if self.settings.logit_kl_scale_by_temperature_squared:
            losses = losses * temperature**2
        return self.post_forward(losses)


def build_criterion(
    config: DistillationConfig, student: TransformerConfig, teacher: TransformerConfig, *, vocab_size: int | None = None
) -> Criterion:
    """The losses of the last pipeline stage, by names of layers in that stage.

    Args:
        config: What is compared, and how.
        student: Megatron-Core's configuration of the student.
        teacher: That of the teacher.
        vocab_size: Tokens of the vocabulary without its padding, which is not compared; None: all.

    Raises:
        ConfigError: a layer lies on an earlier stage.

    """
    if config.criterion is not None:
        return dict(config.criterion)
    criterion: Criterion = {("output_layer", "output_layer"): LogitsDivergence(config, student, vocab_size)}
    if not config.intermediate_layer_pairs:
        return criterion
    projection = _projection(student, teacher)
    for student_name, teacher_name, *kind in config.intermediate_layer_pairs:
        names = local_layer_name(student_name, student), local_layer_name(teacher_name, teacher)
        loss = plugin.MSELoss if kind == ["mse"] else plugin.HiddenStateCosineLoss
        with _quiet():
            criterion[names] = loss(student, projection_layer=projection)
    return criterion


def local_layer_name(name: str, config: TransformerConfig) -> str:
    """The name on the last pipeline stage of a layer with a global number.

    Raises:
        ConfigError: the layer lies on an earlier stage.

    """
    match = re.match(r"decoder\.layers\.(\d+)", name)
    if match is None:
        return name
    offset = get_transformer_layer_offset(config, pp_rank=config.pipeline_model_parallel_size - 1)
    if (index := int(match[1]) - offset) < 0:
        raise ConfigError(
            f"{name!r} is not on the last pipeline stage, which begins with layer {offset}: "
            "losses are computed there; choose a later layer or fewer stages"
        )
    return f"decoder.layers.{index}{name[match.end() :]}"


def sum_of(losses: list[torch.Tensor]) -> Any:
    """The sum; 0.0 for none."""
    return sum(losses[1:], start=losses[0]) if losses else 0.0


def _ratio(target: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """What scales `loss` to the size of `target`; 1 where there is nothing to scale, never negative."""
    target, loss = target.detach(), loss.detach()
    return torch.where((loss > _NOISE) & (target > 0), target / loss.clamp(min=_NOISE), torch.ones_like(loss))


def _projection(student: TransformerConfig, teacher: TransformerConfig) -> torch.nn.Module:
    projection = plugin.ProjectionLayer(student, teacher)
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    for parameter in projection.parameters():
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape).normal_(0.0, student.init_method_std, generator=generator)
            parameter.data.copy_(drawn)
    return projection.to(device=local_device(), dtype=student.params_dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ModelOpt's advice to compare full hidden states only, which `DistillationConfig` has enforced."""
    logger: Any = logging.getLogger(plugin.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
