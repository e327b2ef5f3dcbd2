"""What quantization adds to a model, under names and in shapes that no layout changes: amax, pre_quant_scale and the quantizers' settings.

What exports read, and what parity tests and reports compare. Names count layers over all pipeline stages and experts over all ranks;
tensors are put together from their shards by the same rules as a checkpoint, so rows follow the unsharded weight, where a gated MLP keeps
all gate rows before all up rows.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
from nemo_opt.models.build import unwrap
from nemo_opt.models.shards import GATE_SUFFIX, UP_SUFFIX, full_tensors, quantizer_shards

__all__ = ["QuantizerSettings", "amax_by_name", "global_names", "quantizer_settings", "quantizer_tensors"]

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"(?<!\.experts)\.experts\.linear_")  # Transformer Engine's: one module for all experts of a rank
_GROUPED_WEIGHT = re.compile(r"\.experts\.(linear_\w+)\.weight_quantizer\.(\d+)")
_HALVES = re.compile(f"({GATE_SUFFIX}|{UP_SUFFIX})$")
_AMAX = "._amax"


@dataclass(frozen=True, kw_only=True)
class QuantizerSettings:
    """How one enabled quantizer rounds."""

    num_bits: int | tuple[int, int]
    """Bits of an integer, or exponent and mantissa bits of a float."""
    axis: Any
    """Axes that have an amax of their own; None for one amax."""
    block_sizes: dict[Any, Any] | None
    """Block length by dim (-1, -2), with ModelOpt's `type` and `scale_bits`; None without blocks."""

    @property
    def is_dynamic(self) -> bool:
        """Whether block scales are made from the data of each call."""
        return self.block_sizes is not None and self.block_sizes.get("type") == "dynamic"


def quantizer_tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yields (key, whole tensor on the CPU) of what quantization added; the tensor on rank 0 only, None elsewhere. Collective.

    Args:
        chunks: this rank's chunks of a quantized model.

    Yields:
        `..._quantizer[.0]._amax` as [1], [rows, 1], [rows, blocks] or [row blocks, blocks], with `_w` and `_v` appended for the gate's and
        the up rows of a gated MLP, and `input_quantizer._pre_quant_scale` as [columns].

    """
    repair_amax_sharding()  # whoever quantised with ModelOpt alone has not: the rows of gate and up would be mixed
    return full_tensors(quantizer_shards(chunks))


def amax_by_name(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Amax of every enabled quantizer of the whole model, float32 on the CPU; equal on every rank. Collective.

    Args:
        chunks: this rank's GPTModel, in a list as `build_model` returns it.

    Returns:
        global quantizer name -> scalar tensor (per tensor), [rows] (per channel) or [rows, blocks].

    """
    parts: dict[str, list[torch.Tensor]] = {}
    for key, tensor in quantizer_tensors(chunks):
        if tensor is not None and _AMAX in key:
            parts.setdefault(_HALVES.sub("", key).removesuffix(_AMAX), []).append(torch.atleast_1d(tensor.float()))
    # keys are sorted, up rows (_v) before gate rows (_w)
    message = [{name: _shaped(torch.cat(halves[::-1])) for name, halves in parts.items()}]
    dist.broadcast_object_list(message, src=0)
    return dict(sorted(message[0].items()))


def quantizer_settings(chunks: Sequence[torch.nn.Module]) -> dict[str, QuantizerSettings]:
    """Settings of every enabled quantizer of the whole model by global name; equal on every rank. Collective."""
    own: dict[str, QuantizerSettings] = {}
    for chunk in chunks:
        model = unwrap(chunk)
        names = global_names(model)
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                own[names(name)] = QuantizerSettings(num_bits=module.num_bits, axis=module.axis, block_sizes=module.block_sizes)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return dict(sorted({name: setting for rank in everyone for name, setting in rank.items()}.items()))


def _shaped(amax: torch.Tensor) -> torch.Tensor:
    if amax.numel() == 1:
        return amax.reshape(())
    return amax.squeeze(1) if amax.dim() == 2 and amax.shape[1] == 1 else amax


def global_names(model: Any) -> Callable[[str], str]:
    """What turns the name of a module of `model`, an unwrapped GPTModel, into a checkpoint's: global numbers of layers and of experts.

    An expert is `mlp.experts.experts.5.linear_fc1` in both layer specs; quantizers that all experts of a rank share leave the number out.
    """
    first_expert: dict[str, int] = {
        name: module.local_expert_indices[0] for name, module in model.named_modules() if getattr(module, "local_expert_indices", None)
    }

    def rename(name: str) -> str:
        moe = next((prefix for prefix in first_expert if name.startswith(f"{prefix}.")), None)
        if moe is not None:
            first = first_expert[moe]
            name = _LOCAL_EXPERT.sub(lambda match: f".experts.{first + int(match[1])}.", name)
            name = _GROUPED_WEIGHT.sub(lambda match: f".experts.experts.{first + int(match[2])}.{match[1]}.weight_quantizer", name)
            name = _GROUPED.sub(".experts.experts.linear_", name)
        return _LOCAL_LAYER.sub(lambda match: f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}.", name)

    return rename
