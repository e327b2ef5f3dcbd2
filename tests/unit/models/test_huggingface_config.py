import json

import pytest

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import PRESETS, ModelConfig, RopeScaling
from nemo_opt.models.huggingface_config import config_from_hf, config_to_hf, special_token_ids

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def hf_dir(tmp_path):
    """A directory with a config.json of SIZES and what the test adds."""

    def write(**changes):
        values = {name: value for name, value in (SIZES | changes).items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_sizes_are_read(hf_dir):
    assert config_from_hf(hf_dir()) == ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, vocab_size=300
    )


def test_absent_settings_have_the_defaults_of_transformers(hf_dir):
    config = config_from_hf(hf_dir(rms_norm_eps="absent", num_key_value_heads="absent"))
    assert (config.norm_epsilon, config.num_query_groups, config.tie_embeddings) == (1e-6, 8, False)


@pytest.mark.parametrize(("head_dim", "expected"), [(8, None), (16, 16), ("absent", None), (None, None)])
def test_head_dim_is_kept_where_it_is_unusual(hf_dir, head_dim, expected):
    assert config_from_hf(hf_dir(head_dim=head_dim)).kv_channels == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["transformers 4", "transformers 4, old key", "transformers 5"],
)
def test_rope_scaling_is_read_in_every_spelling(hf_dir, rope):
    config = config_from_hf(hf_dir(**rope))
    assert config.rotary_base == 5e5
    assert config.rope_scaling == RopeScaling(factor=8.0, original_max_position_embeddings=512)


@pytest.mark.parametrize("rope", [{"rope_theta": 2e4}, {"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}])
def test_plain_rope_is_read_in_every_spelling(hf_dir, rope):
    config = config_from_hf(hf_dir(**rope))
    assert (config.rotary_base, config.rope_scaling) == (2e4, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": "absent", "model_type": "qwen2"}, "qwen2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE of type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_a_llama_cannot_express_is_refused(hf_dir, changes, named):
    with pytest.raises(ConfigError, match=f"{named}.*only LlamaForCausalLM is supported"):
        config_from_hf(hf_dir(**changes))


@pytest.mark.parametrize(("value", "named"), [({"quant_method": "fp8"}, "'fp8'"), ("int4", "'int4'")])
def test_quantised_models_are_refused(hf_dir, value, named):
    with pytest.raises(ConfigError, match=rf"is quantised \(quant_method {named}\): give the model that it was made from"):
        config_from_hf(hf_dir(quantization_config=value))


@pytest.mark.parametrize(
    "changes", [{"max_position_embeddings": None}, {"rope_theta": "high"}, {"rms_norm_eps": "small"}, {"rope_scaling": [1]}]
)
def test_values_of_another_type_are_refused(hf_dir, changes):
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_hf(hf_dir(**changes))


def test_missing_settings_are_named(hf_dir):
    with pytest.raises(ConfigError, match=r"config.json lacks \['hidden_size', 'vocab_size'\]"):
        config_from_hf(hf_dir(hidden_size="absent", vocab_size=None))
    with pytest.raises(ConfigError, match=r"^\S+: llama3 RoPE scaling lacks \['low_freq_factor', 'high_freq_factor'\]"):
        config_from_hf(hf_dir(rope_scaling={"rope_type": "llama3", "factor": 2.0}))


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read: No such file"), ('{"hidden_size": 6', "is no JSON"), ("[1]", "holds a list")]
)
def test_unreadable_config_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(tmp_path)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_survives_the_round_trip_through_transformers(tmp_path, name):
    from transformers import AutoConfig

    config = PRESETS[name].with_(kv_channels=PRESETS[name].head_dim * 2)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, dtype="bfloat16")))
    assert config_from_hf(tmp_path) == config
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "rewritten")
    assert config_from_hf(tmp_path / "rewritten") == config


def test_transformers_reads_dtype_and_tokens(tmp_path):
    from transformers import AutoConfig

    tokens = {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(PRESETS["tiny"], dtype="bfloat16", special_tokens=tokens)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert (str(read.dtype), read.bos_token_id, read.eos_token_id, read.pad_token_id) == ("torch.bfloat16", None, 7, 3)


def test_models_that_llama_cannot_express_are_not_written():
    with pytest.raises(ConfigError, match="4 experts"):
        config_to_hf(PRESETS["tiny"].with_(num_moe_experts=4), dtype="float32")
    with pytest.raises(ConfigError, match="hidden_size 100 % num_attention_heads 8 != 0"):
        config_to_hf(PRESETS["tiny"].with_(hidden_size=100, kv_channels=16), dtype="float32")


def test_special_tokens_are_found_by_name(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "pad_token": {"content": "<pad>"}}))
    added = [{"id": 0, "content": "<pad>"}, {"id": 9, "content": "<end>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert special_token_ids(tmp_path) == {"bos_token_id": None, "eos_token_id": 9, "pad_token_id": 0}
