"""Pruning: Minitron width and depth through ModelOpt, and dropping layers by number."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.prune.config import PruningConfig
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

__all__ = ["PruningConfig", "prune_language_model", "save_pruned_model"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"config": ["PruningConfig"], "pruner": ["prune_language_model", "save_pruned_model"]}
)
