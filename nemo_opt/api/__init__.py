"""What a notebook or a command calls: train, quantise, prune, distil, import, export and evaluate.

Every function is collective: it is called on every rank with the same settings, sets up the layout it is given, checks all settings before
long work, and returns a frozen result with numbers. `nemo_opt.launch.run_ranks` starts the ranks. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.api.compress import ptq
    from nemo_opt.api.convert import export_ckpt, import_ckpt
    from nemo_opt.api.corpus import builtin_corpus, data_config
    from nemo_opt.api.distillation import distill
    from nemo_opt.api.measure import evaluate
    from nemo_opt.api.pretrain import train
    from nemo_opt.api.pruning import prune
    from nemo_opt.api.recipe import search_recipe
    from nemo_opt.api.results import (
        DistillResult,
        EvalResult,
        ExportResult,
        ImportResult,
        PruneResult,
        PtqResult,
        RecipeResult,
        Result,
        SweepResult,
        SweepRun,
        TrainResult,
    )
    from nemo_opt.api.sweep import ptq_sweep

__all__ = [
    "DistillResult",
    "EvalResult",
    "ExportResult",
    "ImportResult",
    "PruneResult",
    "PtqResult",
    "RecipeResult",
    "Result",
    "SweepResult",
    "SweepRun",
    "TrainResult",
    "builtin_corpus",
    "data_config",
    "distill",
    "evaluate",
    "export_ckpt",
    "import_ckpt",
    "prune",
    "ptq",
    "ptq_sweep",
    "search_recipe",
    "train",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "compress": ["ptq"],
        "convert": ["export_ckpt", "import_ckpt"],
        "corpus": ["builtin_corpus", "data_config"],
        "distillation": ["distill"],
        "measure": ["evaluate"],
        "pretrain": ["train"],
        "pruning": ["prune"],
        "sweep": ["ptq_sweep"],
        "recipe": ["search_recipe"],
        "results": [
            "DistillResult",
            "EvalResult",
            "ExportResult",
            "ImportResult",
            "PruneResult",
            "PtqResult",
            "RecipeResult",
            "Result",
            "SweepResult",
            "SweepRun",
            "TrainResult",
        ],
    },
)
