"""Repair of ModelOpt: per-channel amax of a gated MLP keeps its place when a checkpoint moves to another tensor parallel size.

Each rank's `linear_fc1` holds its gate rows, then its up rows. Megatron-Core saves weight and bias as two tensors (`_w` and `_v`), so that
they are put together as [all gate, all up]; ModelOpt 0.47 means to do the same with `weight_quantizer._amax` but compares its patterns,
which start at "weight_quantizer", with full keys, which start at "decoder", by `re.match`: nothing ever matches, and the amax comes back
as [gate 0, up 0, gate 1, up 1]. The loss moves by little (2e-4 seen), so no loss tolerance notices.
"""

import re
from typing import Any

import nemo_opt._stack

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from modelopt.torch.quantization.plugins import megatron as plugin

from nemo_opt.errors import UpstreamMovedError

__all__ = ["repair_amax_sharding"]

_AMAX = re.compile(r".*linear_fc1\.weight_quantizer\.(\d+\.)*_amax$")
_UPSTREAM_PATTERN = r"weight_quantizer\.(\d+\.)*_amax$"


def repair_amax_sharding() -> None:
    """Make every quantized gated MLP save and load its per-channel amax as its weight; does nothing the second time.

    Raises:
        UpstreamMovedError: if ModelOpt's code is not the one this repairs.

    """
    mlp = plugin._QuantMegatronMLP
    if getattr(mlp, "_nemo_opt_repaired", False):
        return
    if _UPSTREAM_PATTERN not in mlp._modelopt_state_keys:
        raise UpstreamMovedError(
            f"_QuantMegatronMLP._modelopt_state_keys is {mlp._modelopt_state_keys}: ModelOpt may have mended amax sharding"
        )
    upstream = mlp.sharded_state_dict

    def sharded_state_dict(self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> dict[str, Any]:
        state = upstream(self, prefix, sharded_offsets, metadata)
        if not self.config.gated_linear_unit:
            return state
        return {key: _split_gate_and_up(value, sharded_offsets) if _is_per_channel(key, value) else value for key, value in state.items()}

    mlp.sharded_state_dict = sharded_state_dict
    mlp._nemo_opt_repaired = True


def _is_per_channel(key: str, value: Any) -> bool:
    return _AMAX.match(key) is not None and isinstance(value, ShardedTensor) and len(value.local_shape) == 2


def _split_gate_and_up(amax: ShardedTensor, sharded_offsets: tuple[Any, ...]) -> Any:
    # separate keys for both halves, as ModelOpt makes Megatron-Core do for the weight of the same module
    return apply_swiglu_sharded_factory(amax, sharded_offsets, singleton_local_shards=True)
