"""Upstream's fault, so that its repair there turns this red, and ours. The way through files is in tests/unit/quantize."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from modelopt.torch.quantization.nn import TensorQuantizer
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


class TestGroupedExperts:
    """Upstream's classes as they were before any repair of this process: what they do, and what the repaired ones do."""

    KEYS = tuple(f"weight_quantizer.{expert}._amax" for expert in range(4))

    @pytest.fixture
    def upstream(self):
        """The plugin, loaded anew beside the one that may be repaired already."""
        source = Path(plugin.__file__).read_text()
        names = ("_get_shard_axis_dict", "_process_quantizer_amax")
        tree = ast.parse(source)
        found = {
            (owner.name, node.name): ast.unparse(node)
            for owner in ast.walk(tree)
            if isinstance(owner, ast.ClassDef)
            for node in owner.body
            if isinstance(node, ast.FunctionDef) and node.name in names
        }
        spaces = {}
        for key, text in found.items():
            space = {"TensorQuantizer": TensorQuantizer, "re": re}
            exec(text, space)
            spaces[key] = space[key[1]]
        return spaces

    @pytest.fixture
    def rows(self):
        """A row-parallel linear of four experts as far as those methods look: two rows of two blocks each."""
        quantizers = [SimpleNamespace(axis=(0,)) for _ in self.KEYS]
        return SimpleNamespace(
            weight_quantizer=quantizers,
            weight0=torch.zeros(2, 8),
            get_submodule=lambda name: quantizers[int(name.rsplit(".", 1)[1])],
        )

    def test_upstream_forgets_the_third_expert(self, upstream, rows):
        axes = upstream["_MegatronRowParallelLinear", "_get_shard_axis_dict"](rows, dict.fromkeys(self.KEYS))
        assert list(axes) == list(self.KEYS[:2]), "if all four are here, ModelOpt has mended it: remove the repair"

    def test_ours_cuts_the_blocks_of_every_expert(self, upstream, rows):
        linear = type("Linear", (), {"_get_shard_axis_dict": upstream["_MegatronRowParallelLinear", "_get_shard_axis_dict"]})
        amax_sharding._repair_grouped_rows(linear)
        assert linear._get_shard_axis_dict(rows, dict.fromkeys(self.KEYS)) == dict.fromkeys(self.KEYS, 1)

    def test_upstream_flattens_blocks_and_ours_does_not(self, upstream, rows):
        flat, state = torch.arange(4.0).view(4, 1), {}
        upstream["_QuantMegatronTEGroupedLinear", "_process_quantizer_amax"](rows, self.KEYS[0], flat, state)
        assert state[self.KEYS[0]].shape == (4, 1), "if it is (2, 2), ModelOpt has mended it: remove the repair"

        class Linear:
            _process_quantizer_amax = upstream["_QuantMegatronTEGroupedLinear", "_process_quantizer_amax"]

            def _load_from_state_dict(self, state_dict, prefix):
                self.loaded = state_dict

            def state_dict(self):
                return {"weight_quantizer.0._amax": flat}

        amax_sharding._repair_grouped_linear(Linear)
        ours = Linear()
        ours.weight0 = rows.weight0
        ours._process_quantizer_amax(self.KEYS[0], flat, state)
        assert state[self.KEYS[0]].tolist() == [[0, 1], [2, 3]]
        ours._process_quantizer_amax(self.KEYS[1], torch.ones(3, 1, 2, 1), state)
        ours._process_quantizer_amax(self.KEYS[2], torch.ones(1), state)
        assert [state[key].shape for key in self.KEYS[1:3]] == [(3, 2), (1,)]
        ours._load_from_state_dict({"fc2.weight_quantizer.0._amax": state[self.KEYS[0]], "other": 1}, "fc2.")
        assert torch.equal(ours.loaded["fc2.weight_quantizer.0._amax"], flat)
