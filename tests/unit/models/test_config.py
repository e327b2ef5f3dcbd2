import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import PRESETS, VOCAB_MULTIPLE, ModelConfig, RopeScaling, preset
from nemo_opt.models.huggingface_names import hf_shapes

TINY = PRESETS["tiny"]


def _parameters(config):
    sizes = [1] * len(hf_shapes(config))
    for i, shape in enumerate(hf_shapes(config).values()):
        for size in shape:
            sizes[i] *= size
    return sum(sizes)


# Published counts: 1,235,814,400 and 8,030,261,248 (model cards of Llama 3.2 1B and 3.1 8B).
@pytest.mark.parametrize(("name", "parameters"), [("llama3.2-1b", 1_235_814_400), ("llama3.1-8b", 8_030_261_248)])
def test_presets_have_the_published_number_of_parameters(name, parameters):
    assert _parameters(preset(name)) == parameters


def test_tiny_and_68m_presets():
    assert 1.0e6 < _parameters(TINY) < 1.4e6
    small = preset("68m")
    sizes = (small.hidden_size, small.num_layers, small.ffn_hidden_size, small.num_attention_heads, small.vocab_size)
    assert sizes == (768, 2, 3072, 12, 32000)


def test_preset_changes_fields_and_names_the_known():
    assert preset("tiny", num_layers=2).num_layers == 2
    with pytest.raises(ConfigError, match=r"unknown model preset 'tinny'.*llama3.1-8b.*tiny"):
        preset("tinny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer, got 64.0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"num_query_groups": 3}, "num_attention_heads 8 % num_query_groups 3 != 0: choose groups"),
        ({"hidden_size": 100}, "hidden_size 100 % num_attention_heads 8 != 0: set kv_channels"),
        ({"num_moe_experts": 2, "moe_router_topk": 3}, "moe_router_topk 3 is not in 1..num_moe_experts 2"),
        ({"kv_channels": 0}, "kv_channels must be a positive integer or None, got 0"),
        ({"kv_channels": 15}, "head dimension 15 is odd"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive, got 0.0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TINY.with_(**changes)


def test_kv_channels_free_the_heads_from_the_width():
    assert TINY.with_(hidden_size=100, kv_channels=24).head_dim == 24
    assert TINY.head_dim == 16


@given(st.integers(1, 10**6))
def test_padded_vocabulary_is_the_next_multiple(vocab_size):
    padded = TINY.with_(vocab_size=vocab_size).padded_vocab_size
    assert padded % VOCAB_MULTIPLE == 0
    assert 0 <= padded - vocab_size < VOCAB_MULTIPLE


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_survives_json(name):
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="red"), r"unknown model settings \['colour'\]; known are .*'num_layers'"),
        (lambda v: v.pop("hidden_size"), "incomplete model settings.*hidden_size"),
        (lambda v: v.update(rope_scaling={"factor": 2.0, "low": 1}), "rope_scaling.*low"),
        (lambda v: v.update(rope_scaling=[8.0]), r"rope_scaling must be settings of llama3 scaling or None, got \[8.0\]"),
    ],
)
def test_damaged_settings_are_refused(change, message):
    values = TINY.to_dict()
    change(values)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("changes", [{"factor": 0.0}, {"low_freq_factor": 4.0}, {"original_max_position_embeddings": 0}])
def test_impossible_rope_scaling_is_refused(changes):
    with pytest.raises(ConfigError, match="rope_scaling"):
        RopeScaling(**changes)
