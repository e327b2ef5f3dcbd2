"""Training over Megatron-Core's schedules: the step, losses, optimizer, loop and evaluation.

The function `evaluate` is imported from its module of the same name.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.training.config import TrainingConfig
    from nemo_opt.training.loop import TrainingResult, TrainingRun, train
    from nemo_opt.training.losses import language_model_loss
    from nemo_opt.training.optimizer import build_optimizer, wrap
    from nemo_opt.training.step import MegatronStep

_EXPORTS = {
    "config": ["TrainingConfig"],
    "loop": ["TrainingResult", "TrainingRun", "train"],
    "losses": ["language_model_loss"],
    "optimizer": ["build_optimizer", "wrap"],
    "step": ["MegatronStep"],
}

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs=_EXPORTS)

__all__ = ["MegatronStep", "TrainingConfig", "TrainingResult", "TrainingRun", "build_optimizer", "language_model_loss", "train", "wrap"]
