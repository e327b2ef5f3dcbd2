"""How hidden states of student and teacher are compared, token by token, in float32 whatever their type.

In bfloat16 one minus a cosine near 1 has a resolution of 0.4 %, which is why ModelOpt's losses of the same names are not used.
"""

from typing import Any

import nemo_opt._stack

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt.torch.distill.plugins import megatron as plugin

from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError

__all__ = ["CarriedLoss", "HiddenStateLoss", "projection_between"]

_PROJECTION_SEED = 1234


class HiddenStateLoss(plugin.BaseLoss):  # type: ignore[misc]
    """One minus the cosine, or the mean squared difference, of each token's hidden states; a ModelOpt loss.

    Args:
        kind: "cosine" or "mse".
        student: Megatron-Core's configuration of the student.
        projection: from the student's width to the teacher's; None where they are equal.

    """

    def __init__(self, kind: str, student: TransformerConfig, projection: torch.nn.Module | None) -> None:
        super().__init__(student, projection)
        self.kind = kind

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        """Losses [B, S] of hidden states [S, B, H], with ModelOpt's marks; of this rank's part of S under sequence parallelism."""
        return self.post_forward(self.per_token(predictions, targets), is_sequence_parallel=self._config.sequence_parallel)

    def per_token(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses [S, B] of hidden states [S, B, H]; only the student's get a gradient.

        Raises:
            ConfigError: the shapes differ.

        """
        student, teacher = self.pre_forward(predictions, targets)
        if student.shape != teacher.shape:
            raise ConfigError(
                f"hidden states of the student are {list(student.shape)}, of the teacher {list(teacher.shape)}: "
                "give both models the same sequence length, micro-batch and layout"
            )
        student, teacher = student.float(), teacher.float()
        if self.kind == "mse":
            return (student - teacher).square().mean(-1)
        return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


class CarriedLoss(plugin.BaseLoss):  # type: ignore[misc]
    """A loss that an earlier pipeline stage has computed; a ModelOpt loss."""

    def forward(self, predictions: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        """The losses [B, S], with ModelOpt's marks, of what arrived as [S, B]."""
        del targets
        return self.post_forward(predictions, is_sequence_parallel=self._config.sequence_parallel)


def projection_between(student: TransformerConfig, teacher: TransformerConfig) -> torch.nn.Module | None:
    """The trained linear map from the student's width to the teacher's; None where they are equal.

    It starts from one seed, or its copies on tensor- and data-parallel ranks would differ.
    """
    if student.hidden_size == teacher.hidden_size:
        return None
    projection = plugin.ProjectionLayer(student, teacher)
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    for parameter in projection.parameters():
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape).normal_(0.0, student.init_method_std, generator=generator)
            parameter.data.copy_(drawn)
    moved: torch.nn.Module = projection.to(device=local_device(), dtype=student.params_dtype)
    return moved
