"""Repair of ModelOpt: per-channel amax of a gated MLP keeps its place when a checkpoint moves to another tensor parallel size.

Each rank's `linear_fc1` holds its gate rows, then its up rows. Megatron-Core saves weight and bias as two tensors (`_w` and `_v`), so that
they are put together as [all gate, all up]; ModelOpt 0.47 means to do the same with `weight_quantizer._amax` but compares its patterns,
which start at "weight_quantizer", with full keys, which start at "decoder", by `re.match`: nothing ever matches, and the amax comes back
as [gate 0, up 0, gate 1, up 1]. The loss moves by little (2e-4 seen), so no loss tolerance notices.

Grouped experts (Transformer Engine's) have the same fault, since their MLP is not treated at all, and two more: the amax of their blocks
is saved as one column, [rows * blocks, 1], which cannot be cut along the blocks (here it is [rows, blocks], as that of other linears), and
row-parallel ones ask for the axis of the first two experts only, so that the blocks of the others are taken for replicas.
"""

import re
from collections.abc import Callable
from typing import Any

import nemo_opt._stack

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.plugins import megatron as plugin

from nemo_opt.errors import UpstreamMovedError

__all__ = ["needs_no_amax", "repair_amax_sharding"]

_AMAX = re.compile(r".*linear_fc1\.weight_quantizer\.(\d+\.)*_amax$")
_EXPERT = re.compile(r"weight_quantizer\.\d+\.(\d+\.)*_amax$")
_UPSTREAM_PATTERN = r"weight_quantizer\.(\d+\.)*_amax$"


def needs_no_amax(quantizer: TensorQuantizer) -> bool:
    """Whether block scales come from the data alone (MX formats), so that an amax of the tensor, if there is one, means nothing."""
    sizes = quantizer.block_sizes
    return sizes is not None and sizes.get("type") == "dynamic" and sizes.get("scale_bits") == (8, 0)


def repair_amax_sharding() -> None:
    """Make every quantized gated MLP save and load its per-channel amax as its weight; does nothing the second time.

    Raises:
        UpstreamMovedError: if ModelOpt's code is not the one this repairs.

    """
    mlp = plugin._QuantMegatronMLP
    if _UPSTREAM_PATTERN not in mlp._modelopt_state_keys:
        raise UpstreamMovedError(
            f"_QuantMegatronMLP._modelopt_state_keys is {mlp._modelopt_state_keys}: ModelOpt may have mended amax sharding"
        )
    _once(_repair_mlp, mlp)
    if plugin.HAS_TE:
        _once(_repair_mlp, plugin._MegatronTEGroupedMLP)
        _once(_repair_grouped_linear, plugin._QuantMegatronTEGroupedLinear)
        _once(_repair_grouped_rows, plugin._MegatronTEGroupedRowParallelLinear)


def _once(repair: Callable[[Any], None], upstream: Any) -> None:
    if "_nemo_opt_repaired" not in vars(upstream):
        repair(upstream)
        upstream._nemo_opt_repaired = True


def _repair_mlp(mlp: Any) -> None:
    upstream = mlp.sharded_state_dict

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> dict[str, Any]:
        state = upstream(self, prefix, sharded_offsets, metadata)
        if not self.config.gated_linear_unit:
            return state
        return {key: _split_gate_and_up(value, sharded_offsets) if _is_per_channel(key, value) else value for key, value in state.items()}

    mlp.sharded_state_dict = sharded_state_dict


def _repair_grouped_linear(linear: Any) -> None:
    upstream, load = linear._process_quantizer_amax, linear._load_from_state_dict

    def process_quantizer_amax(self: Any, key: str, amax: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        upstream(self, key, amax, state)
        if amax.dim() == 4:  # of two-dimensional blocks, [row blocks, 1, blocks, 1]
            state[key] = amax.squeeze(3).squeeze(1)
        elif amax.numel() > 1 and amax.numel() % self.weight0.shape[0] == 0:
            state[key] = amax.view(self.weight0.shape[0], -1)

    def load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict()
        for name in own.keys() & {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix) and key.endswith("._amax")}:
            state_dict[prefix + name] = state_dict[prefix + name].view_as(own[name])  # upstream does so in a copy, which nobody reads
        load(self, state_dict, prefix, *args)

    linear._process_quantizer_amax = process_quantizer_amax
    linear._load_from_state_dict = load_from_state_dict


def _repair_grouped_rows(linear: Any) -> None:
    upstream = linear._get_shard_axis_dict

    def get_shard_axis_dict(self: Any, state: dict[str, torch.Tensor]) -> dict[str, int]:
        blocks = [key for key in state if _EXPERT.match(key) and isinstance(self.get_submodule(key.rsplit(".", 1)[0]).axis, tuple)]
        return {**upstream(self, state), **dict.fromkeys(blocks, 1)}

    linear._get_shard_axis_dict = get_shard_axis_dict


def _is_per_channel(key: str, value: Any) -> bool:
    return _AMAX.match(key) is not None and isinstance(value, ShardedTensor) and len(value.local_shape) == 2


def _split_gate_and_up(amax: ShardedTensor, sharded_offsets: tuple[Any, ...]) -> Any:
    # separate keys for both halves, as ModelOpt makes Megatron-Core do for the weight of the same module
    return apply_swiglu_sharded_factory(amax, sharded_offsets, singleton_local_shards=True)
