"""What Megatron-Core's configuration says after pruning, with the other pipeline stages' answers made up."""

from types import SimpleNamespace
from unittest.mock import patch

import nemo_opt._stack

import pytest
from megatron.core.transformer.enums import LayerType

from nemo_opt.models.config import preset
from nemo_opt.prune import stages
from nemo_opt.prune.selection import Kept, KeptLayer

MODEL = preset("tiny", num_layers=5)  # 8 heads of 16 channels in 4 groups
LAYER = KeptLayer(heads=[1, 5], groups=[0, 2], ffn=[range(7)])


def config(**changes):
    sizes = {
        "num_layers": 5, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": None, "ffn_hidden_size": 256,
        "moe_ffn_hidden_size": None, "num_moe_experts": None, "moe_layer_freq": 1, "pipeline_model_parallel_size": 1,
        "pipeline_model_parallel_layout": None, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2,
    }  # fmt: skip
    return SimpleNamespace(**(sizes | changes))


def recorded(kept, *, counts=(), layers_here=1, **changes):
    """The settings that differ afterwards; `counts` is what each stage holds then."""
    settings = config(**changes)
    before = dict(vars(settings))

    def gather(everyone, mine, *, group):
        assert (len(everyone), mine, group) == (len(counts), layers_here, "the stages")
        everyone[:] = counts

    with (
        patch.object(stages.dist, "all_gather_object", gather),
        patch.object(stages.parallel_state, "get_pipeline_model_parallel_group", return_value="the stages"),
    ):
        stages.record_sizes(settings, kept, MODEL, layers_here=layers_here)
    return {name: value for name, value in vars(settings).items() if value != before.get(name)}


def test_sizes_of_a_dense_model():
    sizes = {"num_layers": 2, "hidden_size": 3, "num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 16, "ffn_hidden_size": 7}
    assert recorded(Kept(hidden=[0, 2, 5], layers={2: LAYER, 4: LAYER})) == sizes


def test_sizes_of_a_mixture_of_experts():
    layer = KeptLayer(heads=[1, 5], groups=[0, 2], ffn=[range(7)] * 4, experts=[0, 1, 3])
    sizes = recorded(Kept(hidden=[0], layers={1: layer}), num_moe_experts=4, moe_ffn_hidden_size=256)
    assert (sizes["moe_ffn_hidden_size"], sizes["num_moe_experts"], sizes["ffn_hidden_size"]) == (7, 3, 7)


@pytest.mark.parametrize("name", ["moe_layer_freq", "linear_attention_freq"])
def test_patterns_over_layers_lose_those_that_go(name):
    kept = Kept(hidden=[0], layers=dict.fromkeys((1, 3, 4), LAYER))
    assert recorded(kept, **{name: [5, 6, 7, 8, 9]})[name] == [5, 7, 8]
    assert recorded(kept, **{name: (5, 6, 7, 8, 9)})[name] == [5, 7, 8]
    assert name not in recorded(kept, **{name: 2})


def test_each_stage_says_what_it_holds():
    changed = recorded(
        Kept(hidden=[0], layers=dict.fromkeys((1, 2, 5), LAYER)), counts=(2, 0, 1), layers_here=2, pipeline_model_parallel_size=3
    )
    assert changed["num_layers_in_first_pipeline_stage"] is changed["num_layers_in_last_pipeline_stage"] is None
    layout = changed["pipeline_model_parallel_layout"]
    decoder = LayerType.decoder
    assert layout.layout == [[[LayerType.embedding, decoder, decoder]], [[]], [[decoder, LayerType.loss]]]
