"""Upstream's fault, so that its repair there turns this red, and ours. The way through files is in tests/unit/quantize/test_amax.py."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from modelopt.torch.quantization.plugins import megatron as plugin

from nemo_opt.checkpoint import amax_sharding
from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
from nemo_opt.errors import UpstreamMovedError

KEY = "decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"


def test_upstreams_patterns_match_no_key_of_a_model():
    patterns = plugin._QuantMegatronMLP._modelopt_state_keys
    assert any(re.search(pattern, KEY) for pattern in patterns), "what is meant"
    assert not any(re.match(pattern, KEY) for pattern in patterns), "what is done; if this fails, ModelOpt has mended it: remove the repair"


def _sharded(key, tensor, ranks=2, rank=1):
    return ShardedTensor.from_rank_offsets(key, tensor, (0, rank, ranks))


@pytest.fixture
def mlp():
    """A stand-in for ModelOpt's class whose own sharded state is what it is in a model at TP2, on rank 1."""

    class Mlp:
        _modelopt_state_keys = tuple(plugin._QuantMegatronMLP._modelopt_state_keys)
        config = SimpleNamespace(gated_linear_unit=True)

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return {
                KEY: _sharded(KEY, torch.arange(8.0).view(8, 1)),
                KEY.replace("fc1", "fc2"): _sharded(KEY.replace("fc1", "fc2"), torch.arange(8.0).view(8, 1)),
                KEY.replace("weight_", "input_"): ShardedTensor.from_rank_offsets("scalar", torch.ones(1)),
            }

    with patch.object(amax_sharding.plugin, "_QuantMegatronMLP", Mlp):
        yield Mlp


def test_gate_and_up_get_keys_of_their_own(mlp):
    repair_amax_sharding()
    repair_amax_sharding()  # once is enough, twice changes nothing
    state = mlp().sharded_state_dict()
    assert [type(value) for value in state.values()] == [ShardedTensorFactory, ShardedTensor, ShardedTensor]
    gate, up = state[KEY].build()
    assert (gate.key, up.key) == (f"{KEY}_w", f"{KEY}_v")
    assert gate.data.flatten().tolist() == [0, 1, 2, 3]
    assert up.data.flatten().tolist() == [4, 5, 6, 7]
    assert gate.global_offset == up.global_offset == (4, 0)


def test_per_tensor_amax_and_plain_mlps_stay_as_they_are(mlp):
    repair_amax_sharding()
    plain = mlp()
    plain.config = SimpleNamespace(gated_linear_unit=False)
    assert {type(value) for value in plain.sharded_state_dict().values()} == {ShardedTensor}
    assert not amax_sharding._is_per_channel(KEY, ShardedTensor.from_rank_offsets(KEY, torch.ones(1)))


def test_changed_upstream_is_refused_by_name(mlp):
    mlp._modelopt_state_keys = [r".*weight_quantizer\..*_amax$"]
    with pytest.raises(UpstreamMovedError, match="_modelopt_state_keys"):
        repair_amax_sharding()
