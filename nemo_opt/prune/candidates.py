"""Which architectures fit under limits of size: a grid over widths and depth, the largest first; needs no torch.

The rules are ModelOpt's grid search (`mcore_minitron`): the top share of the choices of each size, all combinations, those within every
limit, ordered by the first limit's metric. What the layout cannot split is left out here, before anything is pruned or scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.footprint import METRICS, footprint

__all__ = ["Candidate", "candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One architecture."""

    sizes: dict[str, int]
    """The searched sizes, by their name in `ModelConfig`."""
    metrics: dict[str, float]
    """What it costs, by metric."""
    score: float | None = None
    """What the score function said of it, higher is better; None where it was not asked."""


def candidates(model: ModelConfig, config: PruningConfig, *, tp: int = 1, ep: int = 1) -> list[Candidate]:
    """All architectures of the search space within `config`'s limits, the largest by its first limit at the front.

    Args:
        model: What is to be pruned.
        config: Limits and search space.
        tp: Tensor parallel ranks that must be able to split the result.
        ep: Expert parallel ranks that must be.

    Raises:
        ConfigError: None fits, and what the smallest of the space needs; or the ranks can split none of them.

    """
    limits = {name: config.limits[name] for name in METRICS if name in config.limits}
    found, smallest = [], dict.fromkeys(limits, float("inf"))
    space = config.search
    for sizes, resized in _combinations(model, config, tp, ep):
        metrics = footprint(resized, sequence_length=space.seq_length, batch_size=space.batch_size)
        if all(metrics[name] <= limit for name, limit in limits.items()):
            found.append(Candidate(sizes=sizes, metrics=metrics))
        smallest = {name: min(least, metrics[name]) for name, least in smallest.items()}
    if float("inf") in smallest.values():
        raise ConfigError(f"tp {tp} and ep {ep} can split no architecture of the search space: choose other divisors, or another layout")
    if not found:
        raise ConfigError(_nothing_fits(limits, smallest, config))
    first = next(iter(limits))
    return sorted(found, key=lambda candidate: candidate.metrics[first], reverse=True)


def _combinations(model: ModelConfig, config: PruningConfig, tp: int, ep: int) -> Iterator[tuple[dict[str, int], ModelConfig]]:
    """Sizes of the grid that the layout can split, with the whole model that they make."""
    choices = config.search.choices(model)
    for values in product(*choices.values()):
        sizes = dict(zip(choices, values, strict=True))
        targets: dict[str, Any] = {f"target_{name}": size for name, size in sizes.items()}
        try:
            yield sizes, PruningConfig(**targets).pruned(model, tp=tp, ep=ep) if targets else model
        except ConfigError:
            continue


def _nothing_fits(limits: dict[str, float], smallest: dict[str, float], config: PruningConfig) -> str:
    wanted = ", ".join(f"{name} <= {limit:,.10g}" for name, limit in limits.items())
    least = ", ".join(f"{name} {value:,.10g}" for name, value in smallest.items())
    return (
        f"no architecture of the search space fits {wanted}; the smallest there have {least}: "
        f"raise the limit, max_width_pruning {config.search.max_width_pruning:g} or max_depth_pruning {config.search.max_depth_pruning:g}"
    )
