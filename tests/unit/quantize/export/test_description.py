"""quantization_config: the form that is chosen, its contents, and that the consumers' own code accepts it."""

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.export.description import COMPRESSED_TENSORS, MODELOPT, choose_method, describe
from nemo_opt.quantize.export.formats import Kind, LinearFormat


def form(kind, block=(1, 0), inputs=True):
    return LinearFormat(kind=kind, block=block, quantizes_inputs=inputs)


FP8, FP8_WEIGHTS = form(Kind.FP8), form(Kind.FP8, inputs=False)
BLOCK = form(Kind.FP8_BLOCK, (64, 128), inputs=False)
INT8, INT8_WEIGHTS = form(Kind.INT8), form(Kind.INT8, inputs=False)
INT4, W4A8 = form(Kind.INT4, (1, 128), inputs=False), form(Kind.W4A8, (1, 128))
NVFP4, NVFP4_WEIGHTS, MXFP8 = form(Kind.NVFP4, (1, 16)), form(Kind.NVFP4, (1, 16), inputs=False), form(Kind.MXFP8, (1, 32))


@pytest.mark.parametrize(
    ("formats", "written", "cache", "method"),
    [
        ([FP8], False, "fp8", MODELOPT),
        ([NVFP4], False, "nvfp4", MODELOPT),
        ([NVFP4_WEIGHTS], False, None, MODELOPT),
        ([MXFP8], False, None, MODELOPT),
        ([W4A8], True, "fp8", MODELOPT),
        ([FP8, NVFP4], False, "fp8", MODELOPT),
        ([INT4], True, None, MODELOPT),
        ([INT4], False, "nvfp4", MODELOPT),
        ([INT4], False, "fp8", COMPRESSED_TENSORS),
        ([INT8], False, None, COMPRESSED_TENSORS),
        ([INT8_WEIGHTS], False, None, COMPRESSED_TENSORS),
        ([FP8_WEIGHTS], False, None, COMPRESSED_TENSORS),
        ([BLOCK], False, "fp8", COMPRESSED_TENSORS),
        ([FP8, INT8, INT4], False, None, COMPRESSED_TENSORS),
        ([FP8, INT4], True, None, MODELOPT),
    ],
)
def test_the_form_that_can_say_it(formats, written, cache, method):
    assert choose_method({str(i): f for i, f in enumerate(formats)}, writes_scales=written, cache=cache) == method


@pytest.mark.parametrize(
    ("formats", "written", "cache"), [([INT8, NVFP4], False, None), ([INT8], False, "nvfp4"), ([INT8, INT4], True, None)]
)
def test_what_neither_form_can_say_is_refused(formats, written, cache):
    with pytest.raises(ConfigError, match=r"no form of export holds both \d \(.*export_format='nemo' keeps them"):
        choose_method({str(i): f for i, f in enumerate(formats)}, writes_scales=written, cache=cache)


def _describe(formats, method, cache=None, written=False):
    return describe(formats, method, unquantized=["lm_head"], cache=cache, writes_scales=written)


def test_modelopt_says_it_twice():
    said = _describe({"a": FP8, "b": FP8}, MODELOPT, "fp8")
    flat, nested = said.quantization_config, said.documents["hf_quant_config.json"]
    assert flat["quant_method"] == "modelopt"
    assert flat["quant_algo"] == nested["quantization"]["quant_algo"] == "FP8"
    assert flat["ignore"] == nested["quantization"]["exclude_modules"] == ["lm_head"]
    assert flat["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert nested["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert nested["producer"]["name"] == "modelopt"


def test_an_nvfp4_cache_is_said_where_engines_look_for_it():
    said = _describe({"a": NVFP4}, MODELOPT, "nvfp4").quantization_config
    assert said["quantization"]["kv_cache_quant_algo"] == "NVFP4"
    assert "kv_cache_scheme" not in said
    assert {"group_size", "exclude_modules"} <= said["quantization"].keys()  # vLLM requires them there


@pytest.mark.parametrize(
    ("kind", "written", "expected"),
    [
        (NVFP4, False, {"quant_algo": "NVFP4", "group_size": 16}),
        (NVFP4_WEIGHTS, False, {"quant_algo": "W4A16_NVFP4", "group_size": 16}),
        (MXFP8, False, {"quant_algo": "MXFP8", "group_size": 32}),
        (INT4, True, {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True}),
        (W4A8, False, {"quant_algo": "W4A8_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": False}),
    ],
)
def test_modelopts_names(kind, written, expected):
    said = _describe({"a": kind}, MODELOPT, written=written)
    assert expected.items() <= said.quantization_config.items()
    assert expected.items() <= said.documents["hf_quant_config.json"]["quantization"].items()


def test_several_formats_are_listed_by_layer():
    said = _describe({"a": FP8, "b": NVFP4}, MODELOPT).quantization_config
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"] == {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}


@pytest.mark.parametrize(
    ("formats", "layout", "strategies"),
    [
        ([INT8], "int-quantized", ["channel"]),
        ([INT8_WEIGHTS], "pack-quantized", ["channel"]),
        ([INT4], "pack-quantized", ["group"]),
        ([FP8_WEIGHTS], "float-quantized", ["tensor"]),
        ([BLOCK], "float-quantized", ["block"]),
        ([INT8, FP8, INT4], "mixed-precision", ["channel", "tensor", "group"]),
    ],
)
@pytest.mark.parametrize("cache", ["fp8", None])
def test_compressed_tensors_accepts_its_form(formats, layout, strategies, cache):
    from compressed_tensors.quantization import QuantizationConfig

    names = {f"model.layers.{i}.mlp.down_proj": f for i, f in enumerate(formats)}
    said = _describe(names, COMPRESSED_TENSORS, cache).quantization_config
    parsed = QuantizationConfig.model_validate(said)
    assert parsed.format == layout
    assert [str(group.weights.strategy) for group in parsed.config_groups.values()] == strategies
    assert [group.input_activations is not None for group in parsed.config_groups.values()] == [f.quantizes_inputs for f in formats]
    assert (parsed.kv_cache_scheme is not None) == (cache is not None)
    targets = [group.targets for group in parsed.config_groups.values()]
    assert targets == ([["Linear"]] if len(formats) == 1 else [[name] for name in names])


def test_the_refusal_names_one_that_each_form_cannot_say():
    formats = {"a": FP8, "b": INT8_WEIGHTS, "c": NVFP4_WEIGHTS}
    with pytest.raises(ConfigError) as refusal:
        choose_method(formats, writes_scales=False, cache=None)
    assert str(refusal.value) == (
        "no form of export holds both b (int8, weights only) and c (nvfp4, weights only) with the KV cache in full precision: "
        "export_format='nemo' keeps them"
    )
    with pytest.raises(ConfigError, match=r"both a \(int8\) and a \(int8\) with the KV cache in nvfp4"):
        choose_method({"a": INT8}, writes_scales=False, cache="nvfp4")


@pytest.mark.parametrize(
    ("kind", "weights", "inputs"),
    [
        (INT8, (8, "int", "channel"), (8, "int", "tensor")),
        (INT8_WEIGHTS, (8, "int", "channel"), None),
        (FP8, (8, "float", "tensor"), (8, "float", "tensor")),
        (INT4, (4, "int", "group"), None),
        (BLOCK, (8, "float", "block"), None),
    ],
)
def test_groups_of_compressed_tensors(kind, weights, inputs):
    said = _describe({"a": kind, "b": kind}, COMPRESSED_TENSORS, "fp8")
    assert said.documents == {}
    quantization = said.quantization_config
    assert {name: value for name, value in quantization.items() if name not in ("config_groups", "format")} == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": _arguments(8, "float", "tensor"),
    }
    (group,) = quantization["config_groups"].values()
    shape = {INT4: {"group_size": 128}, BLOCK: {"block_structure": [64, 128]}}.get(kind, {})
    assert group["weights"] == _arguments(*weights) | shape
    assert group["input_activations"] == (inputs and _arguments(*inputs))
    assert group["output_activations"] is None
    assert group["format"] == quantization["format"]


def _arguments(num_bits, kind, strategy):
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("cache", ["fp8", "nvfp4", None])
def test_what_is_in_the_flat_form(cache):
    keys = {"quant_method", "quant_algo", "ignore", "producer"}
    more = {"fp8": {"kv_cache_scheme"}, "nvfp4": {"quantization"}, None: set()}[cache]
    said = _describe({"a": FP8}, MODELOPT, cache)
    assert said.quantization_config.keys() == keys | more
    assert said.documents["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] == (cache and cache.upper())
    with pytest.raises(AttributeError):
        said.documents = {}
