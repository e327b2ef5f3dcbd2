"""Minitron width and depth pruning through ModelOpt's `mcore_minitron`.

ModelOpt needs Transformer Engine modules (or their reference), one rank per pipeline stage and no other parallelism: checked here, by
name, before any data is read. Its grid of sizes follows from the targets (its defaults, multiples of 256 and 512, refuse small models).
"""

import re
from collections.abc import Callable
from typing import Any

import nemo_opt._stack

import modelopt.torch.opt as mto
import modelopt.torch.prune as mtp
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import spec_of
from nemo_opt.prune.stages import minitron_plugin, record_stage_layers, upstream_output_to_log

__all__ = ["check_layout", "prune_to"]


def check_layout(gpt_model: Any) -> None:
    """Refuse what ModelOpt cannot prune.

    Raises:
        ConfigError: naming the axis or the layer spec, and the remedy.

    """
    config = gpt_model.config
    axes = {
        "tp": config.tensor_model_parallel_size,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        "vp": config.virtual_pipeline_model_parallel_size or 1,
        "dp": parallel_state.get_data_parallel_world_size(),
    }
    if wrong := {name: size for name, size in axes.items() if size > 1}:
        raise ConfigError(
            f"width and depth pruning is not supported yet with {wrong}: every rank must be one pipeline stage "
            f"(tp=1, pp={dist.get_world_size()} here); a checkpoint can be loaded at that layout, and drop_layers works at any tp and pp"
        )
    if spec_of(gpt_model) != "te":
        raise ConfigError(
            "width and depth pruning needs the layer spec 'te', since ModelOpt prunes Transformer Engine's modules: build with spec='te'"
        )


def prune_to(gpt_model: Any, targets: dict[str, int], forward_loop: Callable[[torch.nn.Module], None]) -> None:
    """Prune in place to `targets`, which the model can reach; collective.

    Args:
        gpt_model: an unwrapped GPTModel that `check_layout` accepts.
        targets: sizes by their name in `ModelConfig`.
        forward_loop: shows the model the data that importance is measured on.

    """
    # the query groups stay; ModelOpt would warn of them
    wanted = {name: size for name, size in targets.items() if name != "num_query_groups"}
    if not wanted:
        return
    mode = minitron_plugin().get_mcore_minitron_config(
        hidden_size_divisor=wanted.get("hidden_size", 1),
        ffn_hidden_size_divisor=wanted.get("ffn_hidden_size", 1),
        num_layers_divisor=wanted.get("num_layers", 1),
    )
    marks = _parameter_marks(gpt_model)
    with upstream_output_to_log():
        mtp.prune(
            gpt_model,
            mode=[("mcore_minitron", mode)],
            constraints={"export_config": wanted},
            dummy_input=None,
            config={"forward_loop": forward_loop},
        )
    # what is left is an ordinary model: nothing of the search needs to be restored with it
    mto.ModeloptStateManager.remove_state(gpt_model)
    _restore_parameter_marks(gpt_model, marks)
    record_stage_layers(gpt_model)


def _parameter_marks(gpt_model: Any) -> dict[str, tuple[bool, dict[str, Any]]]:
    """What training reads from parameters beside their values (tensor_model_parallel, shared, ...), by name without the layer index."""
    return {_without_layer(name): (p.requires_grad, dict(vars(p))) for name, p in gpt_model.named_parameters()}


def _restore_parameter_marks(gpt_model: Any, marks: dict[str, tuple[bool, dict[str, Any]]]) -> None:
    """ModelOpt makes new parameters when it slices, without the marks of the old ones."""
    for name, parameter in gpt_model.named_parameters():
        requires_grad, attributes = marks[_without_layer(name)]
        parameter.requires_grad_(requires_grad)
        vars(parameter).update(attributes)


def _without_layer(name: str) -> str:
    return re.sub(r"^(decoder\.layers)\.\d+\.", r"\1.", name)
