import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import PRESETS, ModelConfig
from nemo_opt.models.huggingface_names import hf_pieces, hf_shapes

LAYER_KEYS = [
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight_w",
    "mlp.linear_fc1.weight_v",
    "mlp.linear_fc2.weight",
]


def _keys(config):
    head = [] if config.tie_embeddings else ["output_layer.weight"]
    layers = [f"decoder.layers.{layer}.{key}" for layer in range(config.num_layers) for key in LAYER_KEYS]
    return ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", *head, *layers]


@st.composite
def configs(draw):
    groups, queries, half_head = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        kv_channels=2 * half_head,
        vocab_size=draw(st.integers(1, 300)),
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None)
@given(configs())
def test_every_hf_row_has_exactly_one_place(config):
    rows = {name: [0] * shape[0] for name, shape in hf_shapes(config).items()}
    for key in _keys(config):
        for piece in hf_pieces(key, config):
            for row in range(piece.hf_row, piece.hf_row + piece.num_rows):
                rows[piece.name][row] += 1
    assert all(count == 1 for counts in rows.values() for count in counts)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_pieces_of_a_weight_follow_each_other(config):
    for key in _keys(config):
        row = 0
        for piece in hf_pieces(key, config):
            assert piece.row == row
            row += piece.num_rows


def test_qkv_interleaves_the_groups():
    config = PRESETS["tiny"].with_(num_attention_heads=4, num_query_groups=2, kv_channels=2)
    pieces = hf_pieces("decoder.layers.1.self_attention.linear_qkv.weight", config)
    names = [(piece.name.split(".")[-2], piece.hf_row, piece.num_rows) for piece in pieces]
    assert names == [("q_proj", 0, 4), ("k_proj", 0, 2), ("v_proj", 0, 2), ("q_proj", 4, 4), ("k_proj", 2, 2), ("v_proj", 2, 2)]


@pytest.mark.parametrize("key", ["output_layer.weight", "decoder.layers.9.mlp.linear_fc2.weight", "decoder.layers.0.mlp.router.weight"])
def test_weights_that_a_llama_does_not_have_are_refused(key):
    with pytest.raises(ConfigError, match="has no place in LlamaForCausalLM"):
        hf_pieces(key, PRESETS["tiny"].with_(tie_embeddings=True))
