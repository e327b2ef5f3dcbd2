"""Where the layers of a pair lie in the pipeline, and where their hidden states meet. Needs models' configurations only."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import nemo_opt._stack

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_opt.errors import ConfigError

__all__ = ["ROLES", "Place", "PlacedPair", "Role", "place_pairs"]

type Role = Literal["student", "teacher"]
ROLES: tuple[Role, Role] = ("student", "teacher")

_NUMBERED = re.compile(r"decoder\.layers\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer of one of the models."""

    stage: int
    """The pipeline stage that holds it, from 0."""
    name: str
    """Its name as that stage's chunk has it: layers are numbered anew on each stage."""


@dataclass(frozen=True, kw_only=True)
class PlacedPair:
    """Two layers whose hidden states are compared."""

    student: Place
    """The student's."""
    teacher: Place
    """The teacher's."""
    kind: str
    """"cosine" or "mse"."""
    home: int
    """The stage that computes the loss: the first one that both hidden states can reach."""

    def place(self, role: Role) -> Place:
        """Of the student's or the teacher's layer."""
        return self.student if role == "student" else self.teacher


def place_pairs(pairs: Any, student: TransformerConfig, teacher: TransformerConfig) -> list[PlacedPair]:
    """The pairs of a `DistillationConfig`, in its order.

    Where widths differ all pairs meet on the last stage, which alone holds the trained projection between them.

    Raises:
        ConfigError: a layer's hidden state has no gradient, since it is recomputed in the backward pass.

    """
    return list(_placed(pairs, student, teacher))


def _placed(pairs: Any, student: TransformerConfig, teacher: TransformerConfig) -> Iterator[PlacedPair]:
    last = student.pipeline_model_parallel_size - 1
    for student_name, teacher_name, *kind in pairs:
        _refuse_recomputed(student_name, student)
        places = _place(student_name, student), _place(teacher_name, teacher)
        home = last if student.hidden_size != teacher.hidden_size else max(place.stage for place in places)
        yield PlacedPair(student=places[0], teacher=places[1], kind=kind[0] if kind else "cosine", home=home)


def _place(name: str, config: TransformerConfig) -> Place:
    last = config.pipeline_model_parallel_size - 1
    match = _NUMBERED.match(name)
    if match is None:
        return Place(stage=last, name=name)
    number = int(match[1])
    offsets = [get_transformer_layer_offset(config, pp_rank=stage) for stage in range(last + 1)]
    stage = max(stage for stage, offset in enumerate(offsets) if offset <= number)
    return Place(stage=stage, name=f"decoder.layers.{number - offsets[stage]}{name[match.end() :]}")


def _refuse_recomputed(name: str, config: TransformerConfig) -> None:
    """Megatron-Core runs what it will recompute without a graph, so that a loss on it would teach nothing, silently."""
    modules = config.recompute_modules or []
    part = name.rpartition(".")[2]
    lost = {
        "full": _NUMBERED.match(name) is not None,
        "selective": ("layernorm" in modules and part in ("input_layernorm", "pre_mlp_layernorm"))
        or (part == "mlp" and not {"mlp", "moe"}.isdisjoint(modules)),
    }
    if lost.get(config.recompute_granularity or "", False):
        raise ConfigError(
            f"{name!r} of the student is recomputed in the backward pass (recompute_granularity {config.recompute_granularity!r}): "
            "its hidden state has no gradient there; pair another layer, or turn the recomputation off"
        )
