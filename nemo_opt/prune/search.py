"""Searching for the best architecture under limits of size: the largest candidates are pruned, scored and taken back, one after the other.

ModelOpt's procedure (`mcore_minitron` with `params`, `active_params`, `memory_mb`), on any layout. As there, no candidate is trained before
it is scored, although the Minitron paper does that: the ranking is that of the candidates as they come out of the cut.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import nemo_opt._stack

import torch.distributed as dist

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import model_config_of, unwrap
from nemo_opt.prune.candidates import Candidate, candidates
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.selection import select
from nemo_opt.prune.slicing import slice_model

__all__ = ["ScoreFunction", "SearchResult", "pruned", "search_architecture"]

ScoreFunction = Callable[[Any], float]
"""Called on every rank with the model that was passed, pruned to a candidate; higher is better, and the same number on every rank."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search has found."""

    best: Candidate
    """The one with the highest score; of equal ones the larger."""
    scored: tuple[Candidate, ...]
    """All that were scored, the largest first."""
    fitting: int
    """How many architectures of the space are within the limits."""


def search_architecture(model: Any, config: PruningConfig, scores: ImportanceScores, score: ScoreFunction) -> SearchResult:
    """The best of the `top_k` largest architectures within `config`'s limits; the model is as it was afterwards. Collective.

    Args:
        model: a GPTModel, wrapped (DDP, Float16Module) or not, or a list that holds one, on any layout without virtual stages.
        config: limits and search space.
        scores: importance by which each candidate is cut.
        score: what is maximised, such as a negative validation loss.

    Raises:
        ConfigError: the model is within the limits already, no architecture is, or the score is NaN or differs between ranks.

    """
    gpt_model = unwrap(model)
    sizes, layout = model_config_of(gpt_model), gpt_model.config
    scores.check_model(sizes)
    config.check_against(sizes)
    found = candidates(sizes, config, tp=layout.tensor_model_parallel_size, ep=layout.expert_model_parallel_size)
    scored = []
    for candidate in found[: config.search.top_k]:
        with pruned(gpt_model, scores, candidate.sizes):
            scored.append(replace(candidate, score=_agreed(score(model), candidate)))
    best = max(scored, key=_score)
    return SearchResult(best=best, scored=tuple(scored), fitting=len(found))


@contextmanager
def pruned(gpt_model: Any, scores: ImportanceScores, targets: Mapping[str, int]) -> Iterator[None]:
    """Inside, an unwrapped GPTModel is pruned to `targets`; afterwards it is what it was, also after an error. Collective.

    Slicing gives the model new submodules and changes its configuration in place, but no old tensor: so what is remembered takes no memory.
    """
    config = gpt_model.config
    attributes, settings = dict(vars(gpt_model)), dict(vars(config))
    try:
        slice_model(gpt_model, select(scores, targets))
        yield
    finally:
        for holder, remembered in ((gpt_model, attributes), (config, settings)):
            vars(holder).clear()
            vars(holder).update(remembered)


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def _agreed(value: float, candidate: Candidate) -> float:
    """The score, if all ranks have the same: otherwise they would choose different architectures."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, float(value))
    if any(other != everyone[0] for other in everyone):  # NaN differs from itself
        raise ConfigError(f"the score of {candidate.sizes} must be one number on all ranks, got {everyone}: reduce it over the ranks")
    return float(value)
