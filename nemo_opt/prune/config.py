"""What to prune to: NeMo's PruningConfig, and whether a model can be pruned so; needs no torch.

Which sizes are valid: anything up to the model's, where every query group that stays keeps equally many of its own query heads. So the
heads are a multiple of the groups that stay, and at most as many as those have. Where only the groups are given, they keep all their heads.
Tensor and expert parallel ranks share the pruned widths evenly, as they shared the old ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.prune.footprint import METRICS, footprint
from nemo_opt.prune.space import SearchSpace

__all__ = ["PruningConfig"]

_SIZES = ("ffn_hidden_size", "hidden_size", "num_attention_heads", "num_query_groups", "num_layers", "num_moe_experts")
_MAMBA = ("target_mamba_num_heads", "target_mamba_head_dim")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Sizes to prune to, or layers to drop; fields of NeMo's class."""

    target_ffn_hidden_size: int | None = None
    """Width of the MLP; of one expert's MLP in a mixture-of-experts model."""
    target_hidden_size: int | None = None
    """Width of the residual stream."""
    target_num_attention_heads: int | None = None
    """Query heads; a multiple of the query groups that stay."""
    target_num_query_groups: int | None = None
    """Key/value heads; without target_num_attention_heads their query heads all stay."""
    target_mamba_num_heads: int | None = None
    """Part of NeMo's class; refused, as only GPT models are pruned here."""
    target_mamba_head_dim: int | None = None
    """Part of NeMo's class; refused, as only GPT models are pruned here."""
    target_num_layers: int | None = None
    """Layers to keep, those that change the residual stream most."""
    target_num_moe_experts: int | None = None
    """Experts of every layer, of a mixture-of-experts model."""
    drop_layers: tuple[int, ...] | None = None
    """Layers to drop, counted from 1; excludes every target."""
    target_params: float | None = None
    """Search: at most this many parameters. The three limits combine, and exclude the sizes above and drop_layers."""
    target_active_params: float | None = None
    """Search: at most this many parameters in one token's forward pass (fewer than all in a mixture of experts)."""
    target_memory_mb: float | None = None
    """Search: at most this many MiB of weights and key/value cache in bfloat16."""
    search: SearchSpace = field(default_factory=SearchSpace)
    """What a search looks at."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", SearchSpace.from_any(self.search))
        sizes = {name: value for name in (*(f"target_{size}" for size in _SIZES), *_MAMBA) if (value := getattr(self, name)) is not None}
        if self.drop_layers is not None:
            object.__setattr__(self, "drop_layers", _layer_numbers(self.drop_layers))
            if sizes or self.limits:
                raise ConfigError("drop_layers cannot be used with other pruning parameters")
        if sizes and self.limits:
            raise ConfigError(
                f"{sorted(sizes)} fix sizes that a search by {sorted(self.limits)} would find: give one or the other; "
                "search.hparams_to_skip keeps a size as it is"
            )
        for name, value in sizes.items():
            if name in _MAMBA:
                raise ConfigError(f"{name} is for Mamba layers; only GPT models are pruned here, leave it out")
            if not _is_positive_integer(value):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        for name, limit in self.limits.items():
            if not _is_positive_number(limit):
                raise ConfigError(f"target_{name} must be a positive number, got {limit!r}")

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

    @property
    def limits(self) -> dict[str, float]:
        """Limits of a search, by metric; empty where sizes or layers are named."""
        return {name: value for name in METRICS if (value := getattr(self, f"target_{name}")) is not None}

    def check_against(self, model: ModelConfig, *, tp: int = 1, ep: int = 1) -> None:
        """Refuse, before any work, what this model cannot be pruned to on `tp` tensor and `ep` expert parallel ranks.

        Raises:
            ConfigError: naming the setting, the model's size and the nearest valid values.

        """
        if self.limits:
            self._check_limits(model)
        else:
            self.pruned(model, tp=tp, ep=ep)

    def pruned(self, model: ModelConfig, *, tp: int = 1, ep: int = 1) -> ModelConfig:
        """The sizes of `model` after pruning; raises as `check_against` does. Not for limits: their sizes are found by a search."""
        if self.drop_layers is not None:
            self._check_layers(model.num_layers)
            return model.with_(num_layers=model.num_layers - len(self.drop_layers))
        if not self.targets:
            raise ConfigError("nothing to prune: give at least one target_* size, or drop_layers")
        if self.target_num_moe_experts is not None and model.num_moe_experts is None:
            raise ConfigError(f"target_num_moe_experts {self.target_num_moe_experts} is for mixtures of experts; the model is dense")
        self._check_sizes(model, tp, ep)
        sizes = {"num_attention_heads": self._groups(model) * _heads_per_group(model)} if self.target_num_query_groups else {}
        sizes |= self.targets
        heads, hidden = (sizes.get(name, getattr(model, name)) for name in ("num_attention_heads", "hidden_size"))
        return model.with_(**sizes, kv_channels=None if model.head_dim * heads == hidden else model.head_dim)

    def _groups(self, model: ModelConfig) -> int:
        return self.target_num_query_groups or model.num_query_groups

    def _check_layers(self, num_layers: int) -> None:
        assert self.drop_layers is not None
        if wrong := [n for n in self.drop_layers if n > num_layers]:
            raise ConfigError(f"drop_layers {wrong} out of range: the model has layers 1..{num_layers}")
        if len(self.drop_layers) == num_layers:
            raise ConfigError(f"drop_layers names all {num_layers} layers: keep at least one")

    def _check_limits(self, model: ModelConfig) -> None:
        whole = footprint(model, sequence_length=self.search.seq_length, batch_size=self.search.batch_size)
        if all(whole[name] <= limit for name, limit in self.limits.items()):
            have = ", ".join(f"{name} {whole[name]:,.10g} <= {limit:,.10g}" for name, limit in self.limits.items())
            raise ConfigError(f"nothing to prune: the model is within the limits already ({have})")

    def _check_sizes(self, model: ModelConfig, tp: int, ep: int) -> None:
        size_of = model.to_dict()
        if self.target_num_query_groups is not None:
            valid = [n for n in range(1, model.num_query_groups + 1) if n % tp == 0 or tp % n == 0]
            self._check("num_query_groups", model.num_query_groups, valid, f"is a multiple or a divisor of tp {tp}" if tp > 1 else "")
        groups = self._groups(model)
        self._check(
            "num_attention_heads",
            model.num_attention_heads,
            [n for n in range(groups, groups * _heads_per_group(model) + 1, groups) if n % tp == 0],
            f"is a multiple of the {groups} query groups that stay, which have {groups * _heads_per_group(model)} heads"
            f"{_and_of(tp, 'tp')} (target_num_query_groups prunes the groups)",
        )
        if self.target_num_attention_heads is None and (heads := groups * _heads_per_group(model)) % tp:
            raise ConfigError(f"target_num_query_groups {groups} leaves {heads} heads, {heads} % tp {tp} != 0: choose other groups or a tp")
        smallest_experts = model.moe_router_topk
        for name, first, step, reason in (
            ("hidden_size", 1, 1, ""),
            ("num_layers", 1, 1, ""),
            ("ffn_hidden_size", tp, tp, f"is a multiple of tp {tp}" if tp > 1 else ""),
            ("num_moe_experts", -(-smallest_experts // ep) * ep, ep, f"is at least moe_router_topk {smallest_experts}{_and_of(ep, 'ep')}"),
        ):
            if name in self.targets:
                self._check(name, size_of[name], range(first, size_of[name] + 1, step), reason)

    def _check(self, name: str, size: int, valid: Iterable[int], reason: str) -> None:
        target = self.targets.get(name)
        if target is None or target in (valid := list(valid)):
            return
        nearest = " or ".join(map(str, _nearest(target, valid))) or "none"
        and_reason = f" and {reason}" if reason else ""
        raise ConfigError(
            f"target_{name} {target} cannot be reached from {name} {size}: it is at most that{and_reason}; nearest: {nearest}"
        )


def _heads_per_group(model: ModelConfig) -> int:
    return model.num_attention_heads // model.num_query_groups


def _and_of(size: int, axis: str) -> str:
    return f" and a multiple of {axis} {size}" if size > 1 else ""


def _nearest(target: int, valid: list[int]) -> list[int]:
    """The valid values next to `target`, below and above it."""
    below, above = [n for n in valid if n < target], [n for n in valid if n > target]
    return [*below[-1:], *above[:1]]


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


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
