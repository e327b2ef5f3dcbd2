"""Which architectures a search by size looks at; needs no torch.

The rules are those of ModelOpt's grid search (`mcore_minitron`): for each size the multiples of a divisor and the size itself, and of these
the top share. One difference: ModelOpt's divisors leave a small model no choice at all, so they shrink with it, to an eighth of the size.
Query groups stay as they are, as in ModelOpt.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig

__all__ = ["SearchSpace"]

_DIVISORS = {"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 2, "num_moe_experts": 8}  # ModelOpt's
_SEARCHED = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_moe_experts", "num_layers")


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Bounds and steps of the grid; names and defaults are ModelOpt's."""

    max_width_pruning: float = 0.40
    """Share of the choices of each width, from the largest down, that are looked at."""
    max_depth_pruning: float = 0.20
    """The same for the number of layers."""
    top_k: int = 10
    """Candidates, the largest that fit, that are pruned and scored."""
    hparams_to_skip: tuple[str, ...] = ()
    """Sizes that stay as they are."""
    hidden_size_divisor: int | None = None
    """Choices of hidden_size are its multiples. None: 256, or an eighth of the model's where that is less."""
    ffn_hidden_size_divisor: int | None = None
    """The same for ffn_hidden_size; None: 512, or an eighth."""
    num_layers_divisor: int | None = None
    """The same for num_layers; None: 2, or an eighth."""
    num_moe_experts_divisor: int | None = None
    """The same for the experts of a mixture; None: 8, or an eighth."""
    seq_length: int = 4096
    """Tokens of the key/value cache that memory_mb counts."""
    batch_size: int = 1
    """Sequences of that cache."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hparams_to_skip", _names(self.hparams_to_skip))
        for name in ("max_width_pruning", "max_depth_pruning"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
                raise ConfigError(f"{name} must be a share in (0, 1], got {value!r}")
        for name in ("top_k", "seq_length", "batch_size"):
            if not _is_positive_integer(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in (f"{size}_divisor" for size in _DIVISORS):
            if getattr(self, name) is not None and not _is_positive_integer(getattr(self, name)):
                raise ConfigError(f"{name} must be a positive integer or None, got {getattr(self, name)!r}")

    @classmethod
    def from_any(cls, values: Any) -> Self:
        """A validated space from a space or a mapping; raises `ConfigError` on unknown keys."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise ConfigError(f"search is read from a SearchSpace or a mapping, got {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise ConfigError(f"unknown search settings {unknown}; known are {known}")
        return cls(**values)

    def choices(self, model: ModelConfig) -> dict[str, list[int]]:
        """Values that are looked at, ascending, for each size that has several."""
        found = {}
        for name in _SEARCHED:
            if name in self.hparams_to_skip or getattr(model, name) is None:
                continue
            size, step = getattr(model, name), self._step(name, model)
            values = sorted({*range(step, size + 1, step), size})
            share = self.max_depth_pruning if name == "num_layers" else self.max_width_pruning
            if len(values) > 1:
                found[name] = values[int((1 - share) * len(values)) :]
        return found

    def _step(self, name: str, model: ModelConfig) -> int:
        if name == "num_attention_heads":
            return model.num_query_groups
        given: int | None = getattr(self, f"{name}_divisor")
        return given or max(1, min(_DIVISORS[name], getattr(model, name) // 8))


def _names(names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError(f"hparams_to_skip must be a list of sizes, got {names!r}")
    kept = tuple(names)
    if unknown := [name for name in kept if name not in _SEARCHED]:
        raise ConfigError(f"hparams_to_skip {unknown} are not searched; those are {list(_SEARCHED)}")
    return kept


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
