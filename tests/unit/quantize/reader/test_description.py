"""What directories say of themselves, in the forms of ModelOpt and compressed-tensors, and bad ones."""

import json

import pytest

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.quantize.reader import description
from nemo_opt.quantize.reader.description import is_quantized, read_description

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "tie_word_embeddings": False}
DOWN = "model.layers.1.mlp.down_proj"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
FLOAT, TOKEN = INT8 | {"type": "float"}, {"strategy": "token", "dynamic": True}


def group(weights=INT8, inputs=STATIC, targets=("Linear",), layout="int-quantized"):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": layout}


def compressed(*groups, ignore=("lm_head",), **others):
    named = {f"group_{number}": each for number, each in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore), **others}


def write(folder, said=None, nested=None, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config | ({"quantization_config": said} if said is not None else {})))
    if nested is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": nested}))
    return folder


@pytest.mark.parametrize(
    ("algo", "weight", "inputs", "group"),
    [
        ("FP8", "fp8", "fp8", (1, 0)),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel", "fp8_token", (1, 0)),
        ("fp8_pb_wo", "fp8_block", None, (128, 128)),
        ("NVFP4", "nvfp4", "nvfp4", (1, 16)),
        ("W4A16_NVFP4", "nvfp4", None, (1, 16)),
        ("MXFP8", "mxfp8", "mxfp8", (1, 32)),
        ("W4A16_AWQ", "int4_rows", None, (1, 128)),
        ("W4A8_AWQ", "w4a8", "fp8", (1, 128)),
        ("W8A8_SQ_PER_CHANNEL", "int8", "int8", (1, 0)),
        ("W8A16", "int8", None, (1, 0)),
    ],
)
def test_modelopts_algorithms(tmp_path, algo, weight, inputs, group):
    found = read_description(write(tmp_path, MODELOPT | {"quant_algo": algo}))
    assert len(found.linears) == 14
    assert found.plain == ["lm_head"]
    form = found.linears[DOWN]
    assert (form.weight, form.inputs, form.group) == (weight, inputs, group)
    assert "quantization_config" not in found.config


def test_group_size_is_taken_from_the_description(tmp_path):
    found = read_description(write(tmp_path, MODELOPT | {"quant_algo": "W4A16_AWQ", "group_size": 64}))
    assert found.linears[DOWN].group == (1, 64)


def test_hf_quant_config_alone_and_nested_in_config_are_read(tmp_path):
    nested = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.layers.0.*"]}
    for said, file in ((None, nested), ({"quant_method": "modelopt", "quantization": nested}, None)):
        found = read_description(write(tmp_path, said, file))
        assert found.cache == "nvfp4"
        assert {name.split(".")[2] for name in found.linears} == {"1"}
        assert len(found.plain) == 8


def test_mixed_precision(tmp_path):
    layers = {DOWN: {"quant_algo": "FP8"}, "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}}
    found = read_description(write(tmp_path, MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}))
    assert {name: form.weight for name, form in found.linears.items()} == {DOWN: "fp8", "model.layers.0.mlp.up_proj": "nvfp4"}
    with pytest.raises(ConfigError, match=r"quantized_layers names .*'elsewhere'"):
        read_description(
            write(tmp_path, MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"elsewhere": {"quant_algo": "FP8"}}})
        )


@pytest.mark.parametrize(
    ("weights", "inputs", "layout", "expected"),
    [
        (INT8, STATIC, "int-quantized", ("int8", "int8", (1, 0))),
        (INT8, None, "pack-quantized", ("int8_words", None, (1, 0))),
        (INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32}, None, "pack-quantized", ("int4_words", None, (1, 32))),
        (FLOAT | {"strategy": "tensor"}, None, "float-quantized", ("fp8", None, (1, 0))),
        (FLOAT, STATIC | TOKEN | {"type": "float"}, "float-quantized", ("fp8_channel", "fp8_token", (1, 0))),
        (FLOAT | {"strategy": "block", "block_structure": [64, 128]}, None, "float-quantized", ("fp8_block", None, (64, 128))),
        (INT8, STATIC | TOKEN, "int-quantized", ("int8", "int8_token", (1, 0))),
    ],
)  # fmt: skip
def test_schemes_of_compressed_tensors(tmp_path, weights, inputs, layout, expected):
    found = read_description(write(tmp_path, compressed(group(weights, inputs, layout=layout))))
    assert len(found.linears) == 14
    form = found.linears[DOWN]
    assert (form.weight, form.inputs, form.group) == expected


def test_targets_and_ignored_layers_of_compressed_tensors(tmp_path):
    fp8 = group(INT8 | {"type": "float", "strategy": "tensor"}, None, [r"re:.*layers\.0\.mlp\..*"], "float-quantized")
    said = compressed(fp8, group(targets=[DOWN, "model.layers.0.mlp.up_proj"]), ignore=["lm_head", "re:.*gate_proj"])
    found = read_description(write(tmp_path, said))
    forms = {name: form.weight for name, form in found.linears.items()}
    assert forms == {DOWN: "int8", "model.layers.0.mlp.up_proj": "fp8", "model.layers.0.mlp.down_proj": "fp8"}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [(None, None), ({"num_bits": 8, "type": "float", "dynamic": False}, "fp8"), ("NVFP4", "nvfp4")],
)
def test_the_cache(tmp_path, scheme, expected):
    assert read_description(write(tmp_path, MODELOPT | {"kv_cache_scheme": scheme})).cache == expected


def test_a_tied_head_is_no_linear(tmp_path):
    assert read_description(write(tmp_path, MODELOPT, tie_word_embeddings=True)).plain == []


BAD = [
    (MODELOPT | {"quant_algo": "FP3"}, None, "quant_algo 'FP3' is not known; known are"),
    (MODELOPT | {"kv_cache_scheme": {"num_bits": 4, "type": "int"}}, None, "a KV cache quantised by .* is not known"),
    ({"quant_method": "gptq"}, None, "quant_method 'gptq' is not known; known are modelopt and compressed-tensors"),
    (None, None, "is not quantised: neither config.json nor hf_quant_config.json says how"),
    (MODELOPT, {"quant_algo": "NVFP4"}, "quant_algo is FP8 in config.json and NVFP4 in hf_quant_config.json"),
    (MODELOPT | {"ignore": ["*"]}, None, "names no linear of the model"),
    (compressed(group(INT8 | {"symmetric": False})), None, "weights stored as .* are not known"),
    (compressed(group(INT8 | {"num_bits": 3})), None, "weights stored as .* are not known"),
    (compressed(group(inputs=STATIC | {"strategy": "channel"})), None, "inputs rounded by .* are not known"),
]


@pytest.mark.parametrize(("said", "nested", "message"), BAD)
def test_what_is_not_known_is_named(tmp_path, said, nested, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_description(write(tmp_path, said, nested))


def test_other_architectures_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="only LlamaForCausalLM is read"):
        read_description(write(tmp_path, MODELOPT, architectures=["OPTForCausalLM"]))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_description(tmp_path / "nowhere")
    for text, message in (('{"a"', "is no JSON"), ("[]", "holds a list, not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_description(tmp_path)


def test_is_quantized(tmp_path):
    assert not is_quantized(write(tmp_path))
    assert is_quantized(write(tmp_path, MODELOPT))
    assert is_quantized(write(tmp_path, None, {"quant_algo": "FP8"}))


@pytest.mark.parametrize(
    ("algo", "weight", "inputs", "group", "may_scale_inputs", "label"),
    [
        ("FP8", "fp8", "fp8", (1, 0), False, "FP8"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel", "fp8_token", (1, 0), False, "FP8 per channel and token"),
        ("FP8_PB_WO", "fp8_block", None, (128, 128), False, "FP8 blocks, weights only"),
        ("NVFP4", "nvfp4", "nvfp4", (1, 16), False, "NVFP4"),
        ("W4A16_NVFP4", "nvfp4", None, (1, 16), False, "NVFP4, weights only"),
        ("MXFP8", "mxfp8", "mxfp8", (1, 32), False, "MXFP8"),
        ("W4A16_AWQ", "int4_rows", None, (1, 128), True, "INT4, weights only"),
        ("W4A8_AWQ", "w4a8", "fp8", (1, 128), True, "W4A8"),
        ("W8A8_SQ_PER_CHANNEL", "int8", "int8", (1, 0), True, "INT8"),
        ("W8A16", "int8", None, (1, 0), False, "INT8, weights only"),
    ],
)
def test_what_modelopts_names_stand_for(algo, weight, inputs, group, may_scale_inputs, label):
    form = description._MODELOPT_FORMS[algo]
    assert (form.weight, form.inputs, form.group, form.may_scale_inputs, form.label) == (weight, inputs, group, may_scale_inputs, label)
    assert (algo in description._GROUPED) == bool(group[1])
    with pytest.raises(AttributeError):
        form.label = ""
