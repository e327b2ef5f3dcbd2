"""What a model's configuration says after pruning: its sizes, and an honest account of what each pipeline stage holds.

Megatron-Core computes where a stage's layers begin from the configuration, as if all stages held equally many; a checkpoint saved after
layers went unevenly would then carry wrong names. So the configuration is told the layout that came about.
"""

from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemo_opt.models.config import ModelConfig
from nemo_opt.prune.selection import Kept

__all__ = ["record_sizes"]


def record_sizes(config: Any, kept: Kept, model: ModelConfig, *, layers_here: int) -> None:
    """Write the sizes after pruning into Megatron-Core's configuration of a model; collective.

    Args:
        config: its TransformerConfig, changed in place: wrappers of the model hold the same object.
        kept: what stays.
        model: the sizes before.
        layers_here: how many of the layers that stay are on this rank.

    """
    layer = next(iter(kept.layers.values()))
    config.num_layers = len(kept.layers)
    config.hidden_size = len(kept.hidden)
    config.num_attention_heads = len(layer.heads)
    config.num_query_groups = len(layer.groups)
    config.kv_channels = model.head_dim
    config.ffn_hidden_size = len(layer.ffn[0])
    if layer.experts is not None:
        config.moe_ffn_hidden_size = len(layer.ffn[0])
        config.num_moe_experts = len(layer.experts)
    for name in ("moe_layer_freq", "linear_attention_freq"):
        if isinstance(pattern := getattr(config, name, None), list | tuple):
            setattr(config, name, [pattern[number - 1] for number in kept.layers])
    _record_stages(config, layers_here)


def _record_stages(config: Any, layers_here: int) -> None:
    counts = [0] * config.pipeline_model_parallel_size
    if len(counts) == 1:
        return
    dist.all_gather_object(counts, layers_here, group=parallel_state.get_pipeline_model_parallel_group())
    rows = [["decoder"] * count for count in counts]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    config.num_layers_in_first_pipeline_stage = None
    config.num_layers_in_last_pipeline_stage = None
    config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(rows, config.pipeline_model_parallel_size)
