"""What to prune to: NeMo's PruningConfig, and whether a model can be pruned so; needs no torch.

The grid of valid sizes is ModelOpt's (`mcore_minitron`): query heads are pruned inside their query groups, so their number stays a multiple
of the groups, which stay as they are; hidden and ffn sizes and the number of layers may take any value up to the model's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig

__all__ = ["PruningConfig"]

_SIZES = ("ffn_hidden_size", "hidden_size", "num_attention_heads", "num_query_groups", "num_layers")
_MAMBA = ("target_mamba_num_heads", "target_mamba_head_dim")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Sizes to prune to, or layers to drop; fields of NeMo's class."""

    target_ffn_hidden_size: int | None = None
    """Width of the MLP."""
    target_hidden_size: int | None = None
    """Width of the residual stream."""
    target_num_attention_heads: int | None = None
    """Query heads; a multiple of the query groups."""
    target_num_query_groups: int | None = None
    """Key/value heads; must equal the model's for now, since ModelOpt no longer prunes them (0.41)."""
    target_mamba_num_heads: int | None = None
    """Part of NeMo's class; refused, as only GPT models are pruned here."""
    target_mamba_head_dim: int | None = None
    """Part of NeMo's class; refused, as only GPT models are pruned here."""
    target_num_layers: int | None = None
    """Layers to keep, those that change the residual stream most."""
    drop_layers: tuple[int, ...] | None = None
    """Layers to drop, counted from 1; excludes every target."""

    def __post_init__(self) -> None:
        if self.drop_layers is not None:
            object.__setattr__(self, "drop_layers", _layer_numbers(self.drop_layers))
            if any(value is not None for name, value in asdict(self).items() if name != "drop_layers"):
                raise ConfigError("drop_layers cannot be used with other pruning parameters")
        for name, value in asdict(self).items():
            if name in _MAMBA and value is not None:
                raise ConfigError(f"{name} is for Mamba layers; only GPT models are pruned here, leave it out")
            if name != "drop_layers" and value is not None and not _is_positive_integer(value):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")

    @classmethod
    def from_any(cls, values: Any) -> Self:
        """A validated config from a config, a mapping or an OmegaConf node; raises `ConfigError` on unknown keys."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise ConfigError(f"PruningConfig is read from a dataclass or a mapping, got {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise ConfigError(f"unknown pruning settings {unknown}; known are {known}")
        return cls(**values)

    @property
    def targets(self) -> dict[str, int]:
        """Sizes to prune to, by their name in `ModelConfig`; empty when layers are dropped by number."""
        return {name: value for name in _SIZES if (value := getattr(self, f"target_{name}")) is not None}

    def check_against(self, model: ModelConfig) -> None:
        """Refuse, before any work, what this model cannot be pruned to.

        Raises:
            ConfigError: naming the setting, the model's size and the nearest valid values.

        """
        if self.drop_layers is not None:
            self._check_layers(model.num_layers)
            return
        if not self.targets:
            raise ConfigError("nothing to prune: give at least one target_* size, or drop_layers")
        if model.num_moe_experts is not None:
            raise ConfigError("width and depth pruning of mixture-of-experts models is not supported yet; drop_layers is")
        self._check_sizes(model)

    def _check_layers(self, num_layers: int) -> None:
        assert self.drop_layers is not None
        if wrong := [n for n in self.drop_layers if n > num_layers]:
            raise ConfigError(f"drop_layers {wrong} out of range: the model has layers 1..{num_layers}")
        if len(self.drop_layers) == num_layers:
            raise ConfigError(f"drop_layers names all {num_layers} layers: keep at least one")

    def _check_sizes(self, model: ModelConfig) -> None:
        groups = model.num_query_groups
        if self.target_num_query_groups not in (None, groups):
            raise ConfigError(
                f"target_num_query_groups {self.target_num_query_groups} != {groups} of the model: ModelOpt prunes heads inside their "
                f"query groups and keeps the groups; leave it out or give {groups}"
            )
        for name, target in self.targets.items():
            size, step = getattr(model, name), groups if name == "num_attention_heads" else 1
            if target > size or target % step:
                nearest = " or ".join(map(str, _nearest(target, size, step)))
                of_groups = f" and is a multiple of the {step} query groups" if step > 1 else ""
                raise ConfigError(
                    f"target_{name} {target} cannot be reached from {name} {size}: it is at most that{of_groups}; nearest: {nearest}"
                )


def _nearest(target: int, size: int, step: int) -> list[int]:
    """Valid values next to `target`, below and above it."""
    below, above = min(target // step * step, size), -(-target // step) * step
    return sorted({value for value in (below, above) if step <= value <= size})


def _layer_numbers(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(f"drop_layers must be a list of layer numbers, got {layers!r}")
    numbers = list(layers)
    if not numbers:
        raise ConfigError("drop_layers is given but empty: name the layers to drop, counted from 1, or leave it out")
    if wrong := [n for n in numbers if not _is_positive_integer(n)]:
        raise ConfigError(f"drop_layers {wrong} out of range: layers are counted from 1")
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"drop_layers {numbers} names a layer twice")
    return tuple(sorted(numbers))


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
