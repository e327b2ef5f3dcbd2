"""ModelOpt's state beside the weights: what was done to a model (modes), and each module's quantizer settings.

Decisions:
- The layout is upstream's (`weights/modelopt_state/` for the modes, `_extra_state` entries for the modules), so that other Megatron
  programs can restore our checkpoints. Upstream's own functions refuse virtual pipeline stages, because they handle one model; here all
  chunks are handled together, which is all it takes.
- Modes that only explain how the model came about are left out: a pruned or distilled model is an ordinary model of its present sizes, and
  replaying its pruning would start from sizes that no longer exist (and needs no state to be used).
- The per-channel amax of a gated `linear_fc1` is repaired by `amax_sharding` before any quantised model is saved or loaded.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_opt._stack

import modelopt.torch.opt as mto
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state
from modelopt.torch.quantization.model_calib import max_calibrate
from modelopt.torch.quantization.nn import GroupedQuantizer, TensorQuantizer
from torch.distributed.checkpoint.metadata import Metadata

from nemo_opt.checkpoint.amax_sharding import needs_no_amax, repair_amax_sharding
from nemo_opt.checkpoint.state import chunk_names, drop_absent, is_extra_state, model_state
from nemo_opt.checkpoint.writer import write_sharded
from nemo_opt.errors import CheckpointError
from nemo_opt.models.build import unwrap

__all__ = ["HISTORY_MODES", "STATE_NAME", "is_converted", "needed_state", "restore_modelopt_state", "save_modelopt_state"]

STATE_NAME = "modelopt_state"
HISTORY_MODES = frozenset({"mcore_minitron", "kd_loss", "layerwise_kd", "export_student"})
"""Modes whose result is fully described by the model's sizes and weights."""


def is_converted(model: Any) -> bool:
    """Whether ModelOpt has done anything to the model."""
    return bool(mto.ModeloptStateManager.is_converted(unwrap(model)))


def needed_state(chunks: Sequence[Any]) -> dict[str, Any] | None:
    """ModelOpt's state as saved: without `HISTORY_MODES` and without what the modules keep; None if nothing remains."""
    if not is_converted(chunks[0]):
        return None
    state = copy.deepcopy(mto.modelopt_state(unwrap(chunks[0])))
    state["modelopt_state_dict"] = [mode for mode in state["modelopt_state_dict"] if mode[0] not in HISTORY_MODES]
    remove_per_module_state(state)
    return state if state["modelopt_state_dict"] else None


def save_modelopt_state(state: dict[str, Any], weights: Path) -> None:
    """Writes what `needed_state` gave into `weights`; collective."""
    write_sharded(state, weights / STATE_NAME)


def restore_modelopt_state(chunks: Sequence[Any], weights: Path, metadata: Metadata) -> None:
    """Makes the chunks, built anew, what ModelOpt had made of the saved model; weights are loaded later. Collective.

    Args:
        chunks: All chunks of this rank; changed in place.
        weights: The distributed checkpoint.
        metadata: Its table of contents.

    Raises:
        CheckpointError: ModelOpt cannot restore the state, or a module's state is missing.

    """
    repair_amax_sharding()
    modes = dist_checkpointing.load_common_state_dict(weights / STATE_NAME)
    for chunk in chunks:
        model = unwrap(chunk)
        _make_finite(model)
        if mto.restore_from_modelopt_state(model, copy.deepcopy(modes)) is not model:
            raise CheckpointError(f"ModelOpt replaced the model while restoring {[name for name, _ in modes['modelopt_state_dict']]}")
    _restore_modules(chunks, weights, metadata)


def _make_finite(model: torch.nn.Module) -> None:
    """ModelOpt measures the weights to find the shapes of its buffers, and refuses NaN; the true weights come later."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)


def _restore_modules(chunks: Sequence[Any], weights: Path, metadata: Metadata) -> None:
    wanted, _ = extract_matching_values(model_state(chunks), lambda value: isinstance(value, ShardedObject) and is_extra_state(value.key))
    loaded = dist_checkpointing.load(drop_absent(wanted, metadata), str(weights), validate_access_integrity=False)
    for chunk, name in zip(chunks, chunk_names(chunks), strict=True):
        _set_extra_states(unwrap(chunk), wanted.get(name, {}), loaded.get(name, {}))


def _set_extra_states(model: Any, wanted: dict[str, Any], loaded: dict[str, Any]) -> None:
    for name, module in model.named_modules():
        key = f"{name}._extra_state"
        if not hasattr(module, "modelopt_set_extra_state_callbacks") or key not in wanted:
            continue
        if key in loaded:
            # load_state_dict would not call it: ModelOpt overrides the method of the instance, torch looks at the class
            module.set_extra_state(loaded[key])
            _make_room_for_experts(module)
        elif _is_quantized(module):
            raise CheckpointError(f"the checkpoint lacks ModelOpt's state of {name}: it was saved from a model of other modules")


def _make_room_for_experts(module: Any) -> None:
    """Gives every expert of a grouped linear its amax buffer; upstream measures the first expert's weight and forgets the others'."""
    quantizers = getattr(module, "weight_quantizer", None)
    for index, quantizer in enumerate(quantizers if isinstance(quantizers, GroupedQuantizer) else ()):
        if quantizer.is_enabled and quantizer.amax is None and not needs_no_amax(quantizer):
            weight = getattr(module, f"weight{index}")
            max_calibrate(quantizer, lambda own, weight=weight: own(weight), distributed_sync=False)


def _is_quantized(module: torch.nn.Module) -> bool:
    """Whether any quantizer is on. Attention has (idle) quantizers in one layer spec and none in the other."""
    return any(isinstance(part, TensorQuantizer) and part.is_enabled for part in module.modules())
