"""Which quantizers an export can express, and that the others are refused by name."""

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.export.formats import Kind, LinearFormat, cache_format, linear_formats
from nemo_opt.quantize.tensors import QuantizerSettings

FC2 = "decoder.layers.0.mlp.linear_fc2"
FP8 = QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes=None)
INT8_ROWS = QuantizerSettings(num_bits=8, axis=(0,), block_sizes=None)
INT8 = QuantizerSettings(num_bits=8, axis=None, block_sizes=None)
INT4 = QuantizerSettings(num_bits=4, axis=(0,), block_sizes={-1: 64, "type": "static"})
BLOCKS = QuantizerSettings(num_bits=(4, 3), axis=(0, 2), block_sizes={-1: 128, -2: 64})
NVFP4 = QuantizerSettings(num_bits=(2, 1), axis=None, block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
MXFP8 = QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)})
MXFP4 = QuantizerSettings(num_bits=(2, 1), axis=None, block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)})
KNOWN = [
    (FP8, None, FP8, LinearFormat(kind=Kind.FP8, quantizes_inputs=True)),
    (FP8, None, None, LinearFormat(kind=Kind.FP8, quantizes_inputs=False)),
    (BLOCKS, None, None, LinearFormat(kind=Kind.FP8_BLOCK, block=(64, 128), quantizes_inputs=False)),
    (INT8_ROWS, None, INT8, LinearFormat(kind=Kind.INT8, quantizes_inputs=True)),
    (INT8_ROWS, None, None, LinearFormat(kind=Kind.INT8, quantizes_inputs=False)),
    (INT4, None, None, LinearFormat(kind=Kind.INT4, block=(1, 64), quantizes_inputs=False)),
    (INT4, FP8, FP8, LinearFormat(kind=Kind.W4A8, block=(1, 64), quantizes_inputs=True)),
    (NVFP4, None, NVFP4, LinearFormat(kind=Kind.NVFP4, block=(1, 16), quantizes_inputs=True)),
    (NVFP4, None, None, LinearFormat(kind=Kind.NVFP4, block=(1, 16), quantizes_inputs=False)),
    (MXFP8, None, MXFP8, LinearFormat(kind=Kind.MXFP8, block=(1, 32), quantizes_inputs=True)),
]
UNKNOWN = [
    (FP8, None, INT8),
    (BLOCKS, None, FP8),
    (INT8, None, INT8),
    (INT8_ROWS, None, FP8),
    (INT4, None, INT8),
    (INT4, INT8, FP8),
    (INT4, FP8, None),
    (FP8, FP8, FP8),
    (NVFP4, None, FP8),
    (MXFP8, None, None),
    (MXFP4, None, MXFP4),
    (QuantizerSettings(num_bits=6, axis=0, block_sizes=None), None, None),
]


def _settings(first, second, inputs):
    weights = {f"{FC2}.weight_quantizer": first}
    if second is not None:
        weights = {f"{FC2}.weight_quantizer.0": first, f"{FC2}.weight_quantizer.1": second}
    return weights | ({f"{FC2}.input_quantizer": inputs} if inputs is not None else {})


@pytest.mark.parametrize(("first", "second", "inputs", "expected"), KNOWN)
def test_formats_of_the_algorithms(first, second, inputs, expected):
    assert linear_formats(_settings(first, second, inputs)) == {FC2: expected}
    assert expected.has_row_scales == (expected.kind in (Kind.INT8, Kind.INT4))


@pytest.mark.parametrize(("first", "second", "inputs"), UNKNOWN)
def test_what_no_export_can_say_is_refused_by_name(first, second, inputs):
    with pytest.raises(ConfigError, match=rf"{FC2} is quantised by .*export_format='nemo' keeps it"):
        linear_formats(_settings(first, second, inputs))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{FC2}.output_quantizer", "output_quantizer is enabled: no engine reads"),
        ("decoder.layers.0.self_attention.core_attention.q_bmm_quantizer", "q_bmm_quantizer is enabled"),
        (f"{FC2}.input_quantizer", "but the weight beside it is not quantised"),
        ("output_layer.weight_quantizer", "output_layer is quantised; exports leave the embedding and the head"),
    ],
)
def test_quantizers_in_other_places_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        linear_formats({name: FP8})


def _cache(layers, setting=FP8, parts="kv"):
    linears = {f"decoder.layers.{layer}.self_attention.linear_proj.weight_quantizer": FP8 for layer in range(2)}
    names = [f"decoder.layers.{layer}.self_attention.core_attention.{part}_bmm_quantizer" for layer in layers for part in parts]
    return linears | dict.fromkeys(names, setting)


def test_format_of_the_cache():
    assert cache_format(_cache([])) is None
    assert cache_format(_cache([0, 1])) == "fp8"
    assert cache_format(_cache([0, 1], NVFP4)) == "nvfp4"
    assert linear_formats(_cache([0, 1])).keys() == {f"decoder.layers.{layer}.self_attention.linear_proj" for layer in range(2)}


@pytest.mark.parametrize(
    "settings", [_cache([0]), _cache([0, 1], parts="k"), _cache([0]) | _cache([1], NVFP4), _cache([0, 1], INT8)], ids=str
)
def test_half_a_cache_is_refused(settings):
    with pytest.raises(ConfigError, match="export_format='nemo' keeps it"):
        cache_format(settings)


def test_kinds_are_documented_names():
    assert [str(kind) for kind in Kind] == ["fp8", "block_fp8", "int8", "int4", "w4a8", "nvfp4", "mxfp8"]
    with pytest.raises(AttributeError):
        KNOWN[0][3].kind = Kind.INT8


def test_linears_are_sorted_and_the_first_unknown_is_named():
    linears = {f"decoder.layers.{layer}.mlp.linear_fc2.weight_quantizer": FP8 for layer in (2, 0, 1)}
    assert list(linear_formats(linears)) == [f"decoder.layers.{layer}.mlp.linear_fc2" for layer in range(3)]
    with pytest.raises(ConfigError, match=r"^a.output_quantizer is enabled"):
        linear_formats({"b.output_quantizer": FP8, "a.output_quantizer": FP8})


@pytest.mark.parametrize(
    "first",
    [
        QuantizerSettings(num_bits=4, axis=None, block_sizes={-1: 64, -2: 4}),
        QuantizerSettings(num_bits=4, axis=None, block_sizes={-1: 64, "type": "dynamic"}),
        QuantizerSettings(num_bits=4, axis=0, block_sizes=None),
        QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes={-1: 64}),
        QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes={-2: 64}),
        QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes={-1: 64, -2: 64, "type": "dynamic"}),
        QuantizerSettings(num_bits=(4, 3), axis=0, block_sizes=None),
        QuantizerSettings(num_bits=8, axis=1, block_sizes=None),
        QuantizerSettings(num_bits=8, axis=0, block_sizes={-1: 64}),
        QuantizerSettings(num_bits=(2, 1), axis=None, block_sizes={-1: 32, "type": "dynamic", "scale_bits": (4, 3)}),
        QuantizerSettings(num_bits=(2, 1), axis=None, block_sizes={-1: 16, "type": "static", "scale_bits": (4, 3)}),
        QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes={-1: 16, "type": "dynamic", "scale_bits": (8, 0)}),
    ],
    ids=str,
)
def test_weights_near_a_known_format_are_refused(first):
    with pytest.raises(ConfigError, match="no engine reads that from a Hugging Face directory; export_format='nemo' keeps it"):
        linear_formats(_settings(first, None, None))


@pytest.mark.parametrize("axis", [0, (0,)])
def test_rows_of_int8_by_either_spelling(axis):
    settings = _settings(QuantizerSettings(num_bits=8, axis=axis, block_sizes=None), None, None)
    assert linear_formats(settings)[FC2].kind is Kind.INT8


@pytest.mark.parametrize(
    ("first", "inputs"),
    [
        (MXFP8, NVFP4),
        (NVFP4, MXFP8),
        (INT8_ROWS, INT8_ROWS),
        (INT8_ROWS, QuantizerSettings(num_bits=8, axis=None, block_sizes={-1: 64})),
    ],
)
def test_inputs_in_another_format_are_refused(first, inputs):
    with pytest.raises(ConfigError, match=f"{FC2} is quantised by"):
        linear_formats(_settings(first, None, inputs))
