"""amax of every quantizer under its global name, independent of the layout: what parity tests and reports compare.

Names count layers over all pipeline stages. A per-channel weight amax is put together from the
tensor-parallel shards in the order of the unsharded weight, where a gated MLP keeps all gate rows before all up rows.
"""

import re
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.errors import ConfigError

__all__ = ["amax_by_name"]

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def amax_by_name(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Amax of every enabled quantizer of the whole model, float32 on the CPU; equal on every rank. Collective.

    Args:
        chunks: this rank's GPTModel, in a list as `build_model` returns it.

    Returns:
        global quantizer name -> scalar tensor (per tensor) or [output channels] (per channel).

    """
    own = {
        name: (_flat(quantizer), *_sharding(module, name))
        for name, module, quantizer in _quantizers(chunks)
        if _flat(quantizer) is not None
    }
    stage = {name: _join([rank[name] for rank in _gather(own, parallel_state.get_tensor_model_parallel_group())]) for name in own}
    merged: dict[str, torch.Tensor] = {}
    for part in _gather(stage, parallel_state.get_pipeline_model_parallel_group()):
        merged |= part
    return dict(sorted(merged.items()))


def _quantizers(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module, TensorQuantizer]]:
    """(global name, the module that owns the quantizer, the quantizer) of the enabled ones."""
    found = []
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        for name, module in modules.items():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                owner = modules[re.sub(r"\.\w+_quantizer(\.\d+)*$", "", name)]
                found.append((_global_name(chunk, name), owner, module))
    return found


def _global_name(chunk: Any, name: str) -> str:
    def layer(match: re.Match[str]) -> str:
        return f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}."

    return _LOCAL_LAYER.sub(layer, name)


def _flat(quantizer: TensorQuantizer) -> torch.Tensor | None:
    amax = getattr(quantizer, "_amax", None)
    if amax is None:
        return None
    if quantizer.block_sizes is not None:
        raise ConfigError("amax of block quantizers is not supported yet: their shards have two axes")
    amax = amax.detach().float().cpu()
    return amax.reshape(()) if amax.numel() == 1 else amax.flatten()


def _sharding(module: Any, name: str) -> tuple[bool, bool]:
    """(per-channel amax is split over tensor parallel ranks, its halves are gate and up)."""
    split = name.endswith("weight_quantizer") and bool(getattr(module, "_is_column_parallel", False))
    return split, "linear_fc1" in name and bool(module.config.gated_linear_unit)


def _join(shards: list[tuple[torch.Tensor, bool, bool]]) -> torch.Tensor:
    """The amax of the unsharded tensor from those of the tensor-parallel ranks."""
    first, split, gated = shards[0]
    if first.dim() == 0 or not split:
        return torch.stack([amax for amax, *_ in shards]).amax(dim=0)
    parts = [amax.chunk(2 if gated else 1) for amax, *_ in shards]
    return torch.cat([half for halves in zip(*parts, strict=True) for half in halves])


def _gather(own: Any, group: dist.ProcessGroup) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    return everyone
