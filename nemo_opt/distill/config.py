"""Settings of a distillation, with the fields of NeMo's and ModelOpt's DistillationConfig. No torch in this module.

Decisions:
- Intermediate losses compare hidden states. Only layers whose output has the full hidden dim are accepted: the others are split between
  tensor-parallel ranks, and a cosine of one part is wrong without an error.
- Layer names are global ("decoder.layers.7"), whatever the pipeline layout; they are checked against the models' sizes here.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology

__all__ = ["LOGIT_LOSSES", "DistillationConfig", "Sizes", "load_distillation_config"]

_LOSSES = ("cosine", "mse")
LOGIT_LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon")
"""Defined in `nemo_opt.distill.divergence`."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.(input_layernorm|pre_mlp_layernorm|self_attention|mlp))?")
_FINAL_NORM = "decoder.final_layernorm"
_EXAMPLES = (_FINAL_NORM, "decoder.layers.0", "decoder.layers.0.input_layernorm", "decoder.layers.0.pre_mlp_layernorm",
             "decoder.layers.0.self_attention", "decoder.layers.0.mlp")  # fmt: skip
_LOGITS = "output_layer"


class Sizes(Protocol):
    """What is asked of a model's config: a `ModelConfig`, or Megatron-Core's TransformerConfig."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student learns from the teacher."""

    intermediate_layer_pairs: Sequence[Sequence[str]] = field(default_factory=tuple)
    """Pairs (student layer, teacher layer) whose hidden states are compared, by "cosine" or, as a third entry, "mse"."""
    logit_layers: Sequence[str] = (_LOGITS, _LOGITS)
    """The output heads of student and teacher."""
    skip_lm_loss: bool = True
    """Learn from the teacher alone; else the language model's loss is added."""
    kd_loss_scale: float = 1.0
    """Weight of the distillation loss, relative to the language model's (only without skip_lm_loss)."""
    logit_loss: str = "forward_kl"
    """How next-token distributions are compared: "forward_kl" (NeMo's and ModelOpt's), "reverse_kl" or "jensen_shannon"."""
    logit_kl_temperature: float = 1.0
    """Both logits are divided by this."""
    logit_kl_scale_by_temperature_squared: bool = False
    """Multiply the loss by the temperature's square, so that its gradient keeps its size (Hinton et al.); NeMo and ModelOpt do not."""
    logit_kl_topk: int | None = None
    """Compare the teacher's k likeliest tokens only, their probabilities adding up to 1."""
    criterion: dict[tuple[str, str], Any] | None = None
    """Own ModelOpt losses by pair of layers, in place of those above; names as in this pipeline stage."""
    loss_balancer: Any = None
    """Own ModelOpt DistillationLossBalancer; None means `nemo_opt.distill.LossBalancer`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_layer_pairs", tuple(_pair(pair) for pair in _sequence(self.intermediate_layer_pairs)))
        object.__setattr__(self, "logit_layers", tuple(_sequence(self.logit_layers)))
        if self.logit_layers != (_LOGITS, _LOGITS):
            raise ConfigError(f"logit_layers {self.logit_layers} must be the two output heads ({_LOGITS!r}, {_LOGITS!r})")
        for name in ("kd_loss_scale", "logit_kl_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if self.logit_loss not in LOGIT_LOSSES:
            nearest = _nearest(str(self.logit_loss), LOGIT_LOSSES)
            raise ConfigError(f"unknown logit_loss {self.logit_loss!r}{nearest}; known are {list(LOGIT_LOSSES)}")
        for name in ("skip_lm_loss", "logit_kl_scale_by_temperature_squared"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        topk = self.logit_kl_topk
        if topk is not None and (isinstance(topk, bool) or not isinstance(topk, int) or topk < 1):
            raise ConfigError(f"logit_kl_topk must be a positive integer or none, got {topk!r}")

    def check_topology(self, topology: Topology) -> None:
        """Raises `ConfigError` for a layout that these settings cannot run on."""
        if topology.vp > 1:
            raise ConfigError(f"vp {topology.vp}: distillation does not run on the interleaved pipeline schedule; set vp 1")

    def check_layers(self, student: Sizes, teacher: Sizes) -> None:
        """Raises `ConfigError` for a layer that a model does not have."""
        for pair in self.intermediate_layer_pairs:
            for name, role, sizes in zip(pair, ("student", "teacher"), (student, teacher), strict=False):
                match = _LAYER.fullmatch(name)
                if match and int(match[1]) >= sizes.num_layers:
                    raise ConfigError(f"{name!r} is not in the {role}, whose layers are 0..{sizes.num_layers - 1}")


def load_distillation_config(path: str | Path | None, student_cfg: Sizes, teacher_cfg: Sizes) -> DistillationConfig:
    """The settings in a YAML file, checked against both models; the defaults where `path` is None.

    Raises:
        ConfigError: the file is missing, not YAML, or has unknown or wrong settings; names the nearest known one.

    """
    config = DistillationConfig(**({} if path is None else _read(Path(path))))
    config.check_layers(student_cfg, teacher_cfg)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"distillation settings {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"distillation settings {path} are not YAML of plain values: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"distillation settings {path} hold a {type(values).__name__}, expected names and values")
    known = [f.name for f in fields(DistillationConfig) if f.name not in ("criterion", "loss_balancer")]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown distillation setting {name!r} in {path}{_nearest(str(name), known)}; known are {known}")
    return values


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"expected a list of layer names, got {value!r}")
    return value


def _pair(pair: Any) -> tuple[str, ...]:
    if len(_sequence(pair)) not in (2, 3) or not all(isinstance(name, str) for name in pair):
        raise ConfigError(f"intermediate pair {pair!r} must be (student layer, teacher layer) or (student layer, teacher layer, loss)")
    if len(pair) == 3 and pair[2] not in _LOSSES:
        raise ConfigError(f"unknown intermediate loss {pair[2]!r}{_nearest(pair[2], _LOSSES)}; known are {list(_LOSSES)}")
    for name in pair[:2]:
        if name != _FINAL_NORM and not _LAYER.fullmatch(name):
            raise ConfigError(f"{name!r} is no layer with a full hidden state{_nearest(name, _EXAMPLES)}; for instance {list(_EXAMPLES)}")
    return tuple(pair)
