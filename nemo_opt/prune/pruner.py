"""prune_language_model and save_pruned_model, with NeMo's names and arguments.

Everything that can be refused is refused before data is read or the model touched. Data may come in the three forms of `PruningData`.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import nemo_opt._stack

import modelopt.torch.opt as mto
import torch

from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.build import model_config_of, unwrap
from nemo_opt.parallel import Topology, current_topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.minitron import check_layout, prune_to
from nemo_opt.prune.stages import drop_layers
from nemo_opt.training.forward import Batch, ForwardLoop, forward_loop

__all__ = ["PruningData", "TrainData", "prune_language_model", "save_pruned_model"]


class TrainData(Protocol):
    """The one method of a NeMo (Lightning) data module that pruning needs."""

    def train_dataloader(self) -> Iterable[Batch]:
        """Micro-batches of this data-parallel rank: tokens and position_ids, both [B, S]."""


PruningData = ForwardLoop | Iterable[Batch] | TrainData
"""What importance is measured on: a forward loop `f(model)`, micro-batches, or a data module."""


def prune_language_model(model: Any, pruning_config: Any, data_module: PruningData | None = None, trainer: Any = None) -> Any:
    """Prune `model` in place; collective.

    Args:
        model: a GPTModel, wrapped (DDP, Float16Module) or not, or a list that holds one.
        pruning_config: a `PruningConfig`, a mapping or an OmegaConf node.
        data_module: what importance is measured on; not needed to drop layers by number.
        trainer: only its `limit_val_batches` (a number of batches), as in NeMo; None uses all data.

    Returns:
        the model that was passed. Parameters are new objects: build optimizers and DDP after pruning.

    Raises:
        ConfigError: for settings, sizes or a layout that cannot be pruned; nothing has been changed then.
        DataError: if there is no data.

    """
    config = PruningConfig.from_any(pruning_config)
    gpt_model = unwrap(model)
    if mto.ModeloptStateManager.is_converted(gpt_model):
        raise ConfigError("the model is already converted by ModelOpt (quantized or distilled): prune it before that")
    config.check_against(model_config_of(gpt_model))
    if config.drop_layers is not None:
        _check_one_chunk(gpt_model)
        drop_layers(gpt_model, config.drop_layers)
        return model
    check_layout(gpt_model)
    prune_to(gpt_model, config.targets, _forward_loop(data_module, trainer))
    return model


def save_pruned_model(
    model: Any,
    save_path: Path | str,
    *,
    topology: Topology | None = None,
    tokenizer_dir: Path | str | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model as an ordinary checkpoint, which loads at any layout; collective.

    Args:
        model: what `prune_language_model` returned.
        save_path: directory to write.
        topology: the layout the model lives on; None for the one that is set up.
        tokenizer_dir: tokenizer to copy beside the weights.
        extra: JSON values to keep in the checkpoint's description.
        overwrite: replace an existing checkpoint.

    Returns:
        the directory written.

    """
    topology = topology or current_topology()
    if topology is None:
        raise ConfigError("no layout is set up: pass topology")
    gpt_model = unwrap(model)
    save_checkpoint(
        save_path,
        [gpt_model],
        topology=topology,
        model_config=model_config_of(gpt_model),
        tokenizer_dir=tokenizer_dir,
        extra=extra,
        overwrite=overwrite,
    )
    return Path(save_path)


def _check_one_chunk(gpt_model: Any) -> None:
    if gpt_model.config.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("drop_layers is not supported yet with an interleaved pipeline (vp > 1): load the checkpoint at vp=1")


def _forward_loop(data: PruningData | None, trainer: Any) -> Callable[[torch.nn.Module], None]:
    if data is None:
        raise DataError("importance is measured on data: pass data_module (a forward loop, micro-batches, or a data module)")
    if hasattr(data, "train_dataloader"):
        data = data.train_dataloader()
    if not isinstance(data, Iterable):
        return data
    limit = getattr(trainer, "limit_val_batches", None)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"trainer.limit_val_batches must be a positive number of batches, got {limit!r}")
    return forward_loop(islice(data, limit), description="measuring importance")
