"""Dropping layers by number on any tensor and pipeline layout, and an honest account of what each pipeline stage holds afterwards.

ModelOpt drops and renumbers layers, but Megatron-Core computes where a stage's layers begin from the configuration, as if all stages
held equally many; a checkpoint saved after an uneven drop would then carry wrong names. So the configuration is told the layout that came
about.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemo_opt.errors import ConfigError

__all__ = ["drop_layers", "minitron_plugin", "record_stage_layers", "upstream_output_to_log"]

_log = logging.getLogger(__name__)


def minitron_plugin() -> ModuleType:
    """ModelOpt's pruning plugin, which imports Transformer Engine; raises `ConfigError` where there is none."""
    try:
        from modelopt.torch.prune.plugins import mcore_minitron
    except ImportError as error:
        raise ConfigError(f"ModelOpt prunes only where Transformer Engine is installed ({error}): install nemo_opt[te]") from error
    return mcore_minitron


@contextmanager
def upstream_output_to_log() -> Iterator[None]:
    """What ModelOpt prints (tables, scores) goes to this module's logger, at level INFO, also when it fails."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        if printed.getvalue().strip():
            _log.info(printed.getvalue())


def drop_layers(gpt_model: Any, layers: tuple[int, ...]) -> None:
    """Drop `layers` (counted from 1 over the whole model) in place; collective.

    Args:
        gpt_model: an unwrapped GPTModel, this rank's only chunk.
        layers: valid layer numbers, not all of them.

    """
    with upstream_output_to_log():
        minitron_plugin().drop_mcore_language_model_layers(gpt_model, layers_to_drop=list(layers))
    record_stage_layers(gpt_model)


def record_stage_layers(gpt_model: Any) -> list[int]:
    """Write into the model's configuration how many layers each pipeline stage holds; returns these numbers. Collective."""
    config, block = gpt_model.config, gpt_model.decoder
    block.num_layers_per_pipeline_rank = len(block.layers)
    counts = [0] * config.pipeline_model_parallel_size
    if len(counts) == 1:
        return [len(block.layers)]
    dist.all_gather_object(counts, len(block.layers), group=parallel_state.get_pipeline_model_parallel_group())
    rows = [["decoder"] * count for count in counts]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    config.num_layers_in_first_pipeline_stage = None
    config.num_layers_in_last_pipeline_stage = None
    config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, config.pipeline_model_parallel_size)
    return counts
