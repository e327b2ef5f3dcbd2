"""prune_language_model and save_pruned_model, with NeMo's names and arguments.

Everything that can be refused is refused before data is read or the model touched. Data may come in the three forms of `PruningData`.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import nemo_opt._stack

import modelopt.torch.opt as mto
import torch
import torch.distributed as dist

from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.build import model_config_of, unwrap
from nemo_opt.parallel import Topology, current_topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.digest import weights_digest
from nemo_opt.prune.importance import ImportanceScores, measure_importance
from nemo_opt.prune.search import ScoreFunction, search_architecture
from nemo_opt.prune.selection import keep_layers, select
from nemo_opt.prune.slicing import check_weights, slice_model
from nemo_opt.training.forward import Batch, ForwardLoop, forward_loop

__all__ = ["PruningData", "TrainData", "prune_language_model", "save_pruned_model"]

_log = logging.getLogger(__name__)


class TrainData(Protocol):
    """The one method of a NeMo (Lightning) data module that pruning needs."""

    def train_dataloader(self) -> Iterable[Batch]:
        """Micro-batches of this data-parallel rank: tokens and position_ids, both [B, S]."""


PruningData = ForwardLoop | Iterable[Batch] | TrainData
"""What importance is measured on: a forward loop `f(model)`, micro-batches, or a data module."""


def prune_language_model(
    model: Any,
    pruning_config: Any,
    data_module: PruningData | None = None,
    trainer: Any = None,
    *,
    scores: ImportanceScores | Path | str | None = None,
    save_scores: Path | str | None = None,
    score_function: ScoreFunction | None = None,
) -> Any:
    """Prune `model` in place, on any layout without virtual stages; collective.

    Args:
        model: a GPTModel, wrapped (DDP, Float16Module) or not, or a list that holds one.
        pruning_config: a `PruningConfig`, a mapping or an OmegaConf node.
        data_module: what importance is measured on; not needed with `scores`, or to drop layers by number.
        trainer: only its `limit_val_batches` (a number of batches), as in NeMo; None uses all data.
        scores: importance that was measured before, at this layout or another one, or the file it was saved to: no data is read then.
        save_scores: file to save the scores to.
        score_function: for a search under limits of size only: judges the model, pruned to a candidate; higher is better, and the same
            number on every rank, such as a negative validation loss.

    Returns:
        the model that was passed. Its submodules and parameters are new objects: build optimizers and DDP after pruning.

    Raises:
        ConfigError: for settings, sizes or a layout that cannot be pruned, or scores of another model; nothing has been changed then.
        DataError: if there is no data.

    """
    config = PruningConfig.from_any(pruning_config)
    gpt_model = unwrap(model)
    if mto.ModeloptStateManager.is_converted(gpt_model):
        raise ConfigError("the model is already converted by ModelOpt (quantized or distilled): prune it before that")
    _check_one_chunk(gpt_model)
    sizes, layout = model_config_of(gpt_model), gpt_model.config
    config.check_against(sizes, tp=layout.tensor_model_parallel_size, ep=layout.expert_model_parallel_size)
    if config.limits and score_function is None:
        raise ConfigError(f"a search by {sorted(config.limits)} chooses the best candidate by a score: pass score_function")
    check_weights(gpt_model)
    if config.drop_layers is not None:
        if scores is not None or save_scores is not None:
            raise ConfigError("drop_layers names the layers, so nothing is measured: leave scores and save_scores out")
        kept = keep_layers(sizes, config.drop_layers)
    else:
        scores = _scores(gpt_model, data_module, trainer, scores, save_scores)
        targets = config.targets
        if score_function is not None and config.limits:
            targets = search_architecture(model, config, scores, score_function).best.sizes
        kept = select(scores, targets)
    slice_model(gpt_model, kept)
    return model


def _scores(
    gpt_model: Any,
    data_module: PruningData | None,
    trainer: Any,
    scores: ImportanceScores | Path | str | None,
    save_scores: Path | str | None,
) -> ImportanceScores:
    """Given, read or measured; saved where that is asked for."""
    if scores is None:
        scores = measure_importance(gpt_model, _forward_loop(data_module, trainer))
    else:
        if not isinstance(scores, ImportanceScores):
            scores = ImportanceScores.load(scores, model=model_config_of(gpt_model))
        scores.check_model(model_config_of(gpt_model))
        _warn_of_other_weights(gpt_model, scores)
    if save_scores is not None:
        scores.save(save_scores)
    return scores


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


def _warn_of_other_weights(gpt_model: Any, scores: ImportanceScores) -> None:
    """No error: the weights may only have been cast, or trained a little further."""
    digest = weights_digest(gpt_model)
    if digest != scores.digest and dist.get_rank() == 0:
        _log.warning("importance was measured on other weights (digest %.12s) than these (%.12s) of the same sizes", scores.digest, digest)


def _check_one_chunk(gpt_model: Any) -> None:
    if gpt_model.config.virtual_pipeline_model_parallel_size is not None:
        raise ConfigError("pruning needs one model chunk a rank, this pipeline is interleaved (vp > 1): load the checkpoint at vp=1")


def _forward_loop(data: PruningData | None, trainer: Any) -> Callable[[torch.nn.Module], None]:
    if data is None:
        raise DataError("importance is measured on data: pass data_module (a forward loop, micro-batches, or a data module), or scores")
    if hasattr(data, "train_dataloader"):
        data = data.train_dataloader()
    if not isinstance(data, Iterable):
        return data
    limit = getattr(trainer, "limit_val_batches", None)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"trainer.limit_val_batches must be a positive number of batches, got {limit!r}")
    return forward_loop(islice(data, limit), description="measuring importance")
