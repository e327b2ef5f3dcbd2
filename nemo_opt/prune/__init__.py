"""Pruning: Minitron width and depth by measured importance, and dropping layers by number, on any layout."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.prune.config import PruningConfig
    from nemo_opt.prune.importance import ImportanceScores, measure_importance
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

__all__ = ["ImportanceScores", "PruningConfig", "measure_importance", "prune_language_model", "save_pruned_model"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["PruningConfig"],
        "importance": ["ImportanceScores", "measure_importance"],
        "pruner": ["prune_language_model", "save_pruned_model"],
    },
)
