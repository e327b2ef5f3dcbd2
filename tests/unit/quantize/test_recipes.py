import copy
import json

import modelopt.torch.quantization as mtq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.config import need_calibration

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.blocks import weight_cfgs
from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig
from nemo_opt.quantize.recipes import get_quant_cfg_choices, kv_format, load_quant_cfg, localized, needs_data, quant_cfg_of, save_quant_cfg

NAMES = sorted(name for name in dir(mtq) if name.endswith("_CFG") and "algorithm" in getattr(mtq, name))


def entries(quant_cfg, part):
    return [entry for entry in quant_cfg["quant_cfg"] if part in entry["quantizer_name"]]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_of_modelopt_loads_back_equal(tmp_path, name, suffix):
    path = tmp_path / f"recipe{suffix}"
    save_quant_cfg(getattr(mtq, name), path)
    assert load_quant_cfg(path) == getattr(mtq, name)


def test_json_as_nemo_writes_it_loads_back_equal(tmp_path):
    for name in ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"):
        path = tmp_path / "nemo.json"
        path.write_text(json.dumps(getattr(mtq, name)))
        assert load_quant_cfg(path) == getattr(mtq, name)


def test_older_files_are_read(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3], "axis": None}}, "algorithm": "max"}))
    with pytest.warns(DeprecationWarning, match="legacy dict format"):
        loaded = load_quant_cfg(path)
    assert loaded["quant_cfg"][0]["quantizer_name"] == "*weight_quantizer"
    assert next(weight_cfgs(loaded))["num_bits"] == (4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no recipe"),
        ("[]", "must map quant_cfg"),
        ('{"algorithm": "max"}', "must map quant_cfg"),
        ('{"quant_cfg": 3, "algorithm": "max"}', "that ModelOpt accepts"),
        ('{"quant_cfg": [{"quantizer_name": "*", "cfg": {}, "enable": true}], "algorithm": "max"}', "that ModelOpt accepts"),
        ('{"quant_cfg": [], "algorithm": "max", "more": 1}', "that ModelOpt accepts"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.json.*{message}"):
        load_quant_cfg(path)
    with pytest.raises(ConfigError, match="none"):
        load_quant_cfg(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_named_algorithms_are_modelopts(name):
    quant_cfg = quant_cfg_of(QuantizationConfig(algorithm=name, enable_kv_cache=False))
    expected = get_quant_cfg_choices()[name]
    if name == "int8_sq":
        expected["algorithm"] = {"method": "smoothquant", "alpha": 0.5}
    assert quant_cfg == expected


@given(algorithm=st.sampled_from(ALGORITHMS), block=st.integers(1, 512), rows=st.integers(1, 512), kv=st.booleans(), weights=st.booleans())
def test_nothing_handed_out_is_shared(algorithm, block, rows, kv, weights):
    before = copy.deepcopy({name: getattr(mtq, name) for name in NAMES})
    config = QuantizationConfig(
        algorithm=algorithm, awq_block_size=block, fp8_block_shape=(rows, block), enable_kv_cache=kv, weight_only=weights
    )
    quant_cfg = quant_cfg_of(config)
    quant_cfg["quant_cfg"][1]["cfg"] = "changed"
    quant_cfg["quant_cfg"].clear()
    assert before == {name: getattr(mtq, name) for name in NAMES}
    assert quant_cfg_of(config)["quant_cfg"]


@pytest.mark.parametrize("name", ["int4", "int4_awq", "w4a8_awq"])
def test_block_size_is_honoured(name):
    first, *rest = weight_cfgs(quant_cfg_of(QuantizationConfig(algorithm=name, awq_block_size=32)))
    assert first["block_sizes"] == {-1: 32, "type": "static"}
    assert all("block_sizes" not in cfg for cfg in rest)


def test_block_shape_is_honoured_and_nothing_else_has_it():
    (cfg,) = weight_cfgs(quant_cfg_of(QuantizationConfig(algorithm="block_fp8", fp8_block_shape=(16, 64), awq_block_size=4)))
    assert cfg["block_sizes"] == {-2: 16, -1: 64}
    (cfg,) = weight_cfgs(quant_cfg_of(QuantizationConfig(algorithm="nvfp4", fp8_block_shape=(8, 8), awq_block_size=4)))
    assert cfg["block_sizes"][-1] == 16


@pytest.mark.parametrize(
    ("decoder_type", "algorithm"), [(name, {"method": "awq_lite", "alpha_step": 1}) for name in ("gemma", "mpt")] + [("llama", "awq_lite")]
)
def test_search_is_coarse_where_nemos_is(decoder_type, algorithm):
    assert quant_cfg_of(QuantizationConfig(algorithm="w4a8_awq", decoder_type=decoder_type))["algorithm"] == algorithm


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"algorithm": "fp8"}, "fp8"),
        ({"algorithm": "int4_awq"}, "fp8"),
        ({"algorithm": "nvfp4", "kv_cache_qformat": "nvfp4"}, "nvfp4"),
        ({"algorithm": "fp8", "decoder_type": "gpt"}, None),
        ({"algorithm": "fp8", "decoder_type": "gpt", "enable_kv_cache": True}, "fp8"),
        ({"algorithm": "int8"}, None),
        ({"algorithm": "int8_sq"}, None),
        ({"algorithm": "int8", "enable_kv_cache": True}, None),
        ({"algorithm": "int8", "enable_kv_cache": True, "kv_cache_qformat": "fp8"}, "fp8"),
        ({"algorithm": "fp8", "enable_kv_cache": False}, None),
        ({"algorithm": "FP8_DEFAULT_CFG"}, None),
        ({"algorithm": "FP8_DEFAULT_CFG", "enable_kv_cache": True}, "fp8"),
    ],
)
def test_kv_cache_by_nemos_rule(settings, expected):
    config = QuantizationConfig(**settings)
    assert kv_format(config) == expected
    found = entries(quant_cfg_of(config), "bmm_quantizer")
    assert [entry["cfg"]["num_bits"] for entry in found] == {None: [], "fp8": [(4, 3)], "nvfp4": [(2, 1)]}[expected]


@pytest.mark.parametrize("name", ["mxfp8", "fp8"])
def test_a_cache_is_calibrated_even_beside_formats_that_need_none(name):
    assert quant_cfg_of(QuantizationConfig(algorithm=name, enable_kv_cache=True))["algorithm"] == "max"
    assert quant_cfg_of(QuantizationConfig(algorithm=name, enable_kv_cache=False))["algorithm"] == {"mxfp8": None, "fp8": "max"}[name]


def test_the_caches_entries_are_copies():
    before = copy.deepcopy(mtq.FP8_KV_CFG)
    (entry,) = entries(quant_cfg_of(QuantizationConfig(algorithm="fp8")), "bmm_quantizer")
    entry["cfg"]["num_bits"] = 8
    assert before == mtq.FP8_KV_CFG


def test_weight_only_switches_inputs_off_last():
    quant_cfg = quant_cfg_of(QuantizationConfig(algorithm="fp8", weight_only=True, enable_kv_cache=False))
    assert quant_cfg["quant_cfg"][-1] == {"quantizer_name": "*input_quantizer", "enable": False}


def test_other_configurations_by_name_and_by_file(tmp_path):
    assert quant_cfg_of(QuantizationConfig(algorithm="INT8_WEIGHT_ONLY_CFG")) == mtq.INT8_WEIGHT_ONLY_CFG
    path = tmp_path / "mine.yaml"
    save_quant_cfg(mtq.MXINT8_DEFAULT_CFG, path)
    assert quant_cfg_of(QuantizationConfig(algorithm=str(path))) == mtq.MXINT8_DEFAULT_CFG
    assert quant_cfg_of(QuantizationConfig(algorithm=None)) is None


@pytest.mark.parametrize("name", ["FP8_KV_CFG", "NO_SUCH_CFG", "INT9_DEFAULT_CFG"])
def test_unknown_configurations_are_refused_with_the_known(name):
    with pytest.raises(ConfigError, match=rf"'{name}'.*'FP8_DEFAULT_CFG'"):
        quant_cfg_of(QuantizationConfig(algorithm=name))


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_data_is_what_modelopt_says(name):
    assert needs_data(getattr(mtq, name)) == (need_calibration(getattr(mtq, name)) and not name.startswith("MX"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"algorithm": "fp8", "weight_only": True, "enable_kv_cache": False}, False),
        ({"algorithm": "fp8", "weight_only": True}, True),
        ({"algorithm": "int4", "enable_kv_cache": False}, False),
        ({"algorithm": "mxfp8", "enable_kv_cache": False}, False),
        ({"algorithm": "nvfp4", "enable_kv_cache": False}, True),
        ({"algorithm": "int4_awq", "enable_kv_cache": False}, True),
    ],
)
def test_entries_that_switch_off_again_need_no_data(settings, expected):
    assert needs_data(quant_cfg_of(QuantizationConfig(**settings))) is expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([], True),
        ([{"quantizer_name": "*", "enable": False}], False),
        ([{"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False}], True),
        ([{"quantizer_name": "*input_quantizer", "enable": False}], False),
        ([{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}], False),
        ([{"quantizer_name": "*input_quantizer", "cfg": {"type": "dynamic"}}], False),
        ([{"quantizer_name": "*input_quantizer", "cfg": [{"type": "dynamic"}, {"num_bits": 8}]}], True),
        ([{"quantizer_name": "*input_quantizer", "cfg": {"block_sizes": {"type": "dynamic", "scale_bits": (8, 0)}}}], False),
        ([{"quantizer_name": "*input_quantizer", "cfg": {"block_sizes": {"type": "dynamic", "scale_bits": (4, 3)}}}], True),
        ([{"quantizer_name": "*input_quantizer", "cfg": {"block_sizes": {"type": "static", "scale_bits": (8, 0)}}}], True),
    ],
)
def test_the_last_entry_of_a_name_says_whether_data_is_needed(last, expected):
    first = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}}
    assert needs_data({"quant_cfg": [first, *last], "algorithm": "max"}) is expected


def test_files_keep_the_order_of_entries_and_end_in_a_line(tmp_path):
    """A person may read and change them."""
    for suffix, text in ((".json", '{\n  "quant_cfg": [],\n  "algorithm": "max"\n}\n'), (".yaml", "quant_cfg: []\nalgorithm: max\n")):
        path = tmp_path / f"recipe{suffix}"
        save_quant_cfg({"quant_cfg": [], "algorithm": "max"}, path)
        assert path.read_text() == text


def test_layers_count_over_all_stages():
    names = ["*weight_quantizer", "decoder.layers.1.mlp.linear_fc1.weight_quantizer", "*layers.12.*", "*.layers.13.*input_quantizer"]
    quant_cfg = {"quant_cfg": [{"quantizer_name": name, "enable": False} for name in names], "algorithm": "max"}
    local = localized(quant_cfg, [12, 13])
    assert [entry["quantizer_name"] for entry in local["quant_cfg"]] == ["*weight_quantizer", "*layers.0.*", "*.layers.1.*input_quantizer"]
    assert local["algorithm"] == "max"
    assert [entry["quantizer_name"] for entry in quant_cfg["quant_cfg"]] == names
    assert localized(quant_cfg, range(20)) == quant_cfg


def test_nemos_names_lie_on_the_package():
    import nemo_opt.quantize as package

    assert package.load_quant_cfg is load_quant_cfg
    assert package.save_quant_cfg is save_quant_cfg
    assert package.get_quant_cfg_choices() == get_quant_cfg_choices()
