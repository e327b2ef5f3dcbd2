from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.config import ALGORITHMS, EXPORT_FORMATS, SEARCHABLE, ExportConfig, QuantizationConfig, is_recipe_file


def test_defaults_are_nemos():
    config = QuantizationConfig()
    assert (config.algorithm, config.awq_block_size, config.sq_alpha) == ("fp8", 128, 0.5)
    assert (config.enable_kv_cache, config.kv_cache_qformat) == (None, None)
    assert (config.fp8_block_shape, config.weight_only, config.calibration_packing, config.decoder_type) == (
        (128, 128),
        False,
        "pack",
        None,
    )
    assert (config.calibration_dataset, config.calibration_dataset_size) == ("cnn_dailymail", 512)
    assert (config.calibration_batch_size, config.calibration_seq_len) == (64, 128)
    export = ExportConfig(path="out")
    assert (export.path, export.export_format, export.dtype) == (Path("out"), "trtllm", "bf16")
    assert (export.decoder_type, export.inference_tp, export.inference_pp, export.generate_sample) == (None, 1, 1, False)


def test_names_are_documented_ones():
    """Files and command lines hold them: they may be added to, not changed."""
    assert ALGORITHMS == ("block_fp8", "fp8", "int4", "int4_awq", "int8", "int8_sq", "mxfp8", "nvfp4", "w4a8_awq")
    assert set(ALGORITHMS) - set(SEARCHABLE) == {"int4_awq", "int8_sq", "w4a8_awq"}, "those with a search of their own"
    assert set(SEARCHABLE) < set(ALGORITHMS)
    assert EXPORT_FORMATS == ("nemo", "hf", "trtllm")
    assert [is_recipe_file(f"recipe{suffix}") for suffix in (".json", ".yaml", ".yml", ".txt", "")] == [True, True, True, False, False]


@pytest.mark.parametrize("settings", [{"enable_kv_cache": value} for value in (True, False, None)])
@pytest.mark.parametrize(
    "more", [{"kv_cache_qformat": "fp8"}, {"kv_cache_qformat": "nvfp4"}, {"calibration_packing": "pad"}, {"weight_only": True}]
)
def test_every_choice_is_accepted(settings, more):
    config = QuantizationConfig(**settings, **more)
    assert config == settings | more
    assert config != QuantizationConfig(sq_alpha=0.25, **settings, **more)


@pytest.mark.parametrize("alpha", [0, 0.0, 1.0])
def test_migration_may_be_all_or_nothing(alpha):
    assert QuantizationConfig(sq_alpha=alpha).sq_alpha == alpha


def test_configs_are_made_by_name_and_stay_as_they_are():
    for make in (lambda: QuantizationConfig("fp8"), lambda: ExportConfig("out")):
        with pytest.raises(TypeError, match="positional"):
            make()
    with pytest.raises(AttributeError):
        QuantizationConfig().sq_alpha = 0.25
    with pytest.raises(AttributeError):
        ExportConfig(path="out").dtype = 16


@pytest.mark.parametrize("algorithm", ["int7", "", 8, "FP8_DEFAULT"])
def test_unknown_algorithm_is_refused_with_the_choices(algorithm):
    with pytest.raises(ConfigError, match=rf"{algorithm!r}; choose one of .*'fp8', 'int4'.*_CFG.*\.yaml"):
        QuantizationConfig(algorithm=algorithm)


def test_recipes_are_files_that_exist(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match=r"recipe\.yaml does not exist"):
        QuantizationConfig(algorithm=str(path))
    path.touch()
    assert is_recipe_file(QuantizationConfig(algorithm=str(path)).algorithm)
    assert not any(map(is_recipe_file, ALGORITHMS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("awq_block_size", 0),
        ("calibration_dataset_size", 0),
        ("calibration_batch_size", -1),
        ("calibration_seq_len", 1.5),
        ("calibration_seq_len", True),
        ("sq_alpha", 1.01),
        ("sq_alpha", -0.01),
        ("enable_kv_cache", "yes"),
        ("weight_only", 1),
        ("calibration_packing", "stretch"),
        ("fp8_block_shape", 128),
        ("fp8_block_shape", (128,)),
        ("fp8_block_shape", (128, 0)),
        ("fp8_block_shape", "12"),
    ],
)
def test_bad_value_is_refused_by_field_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must"):
        QuantizationConfig(**{field: value})


def test_bad_kv_cache_format_is_refused():
    with pytest.raises(ConfigError, match="Unsupported kv cache quantization format 'int3'; known are"):
        QuantizationConfig(algorithm="int8", kv_cache_qformat="int3")


def test_block_shape_may_be_any_sequence():
    assert QuantizationConfig(fp8_block_shape=[16, 32]).fp8_block_shape == (16, 32)
    assert QuantizationConfig.from_any(OmegaConf.create({"fp8_block_shape": [16, 32]})).fp8_block_shape == (16, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ""),
        ("path", None),
        ("export_format", "onnx"),
        ("dtype", "32"),
        ("dtype", 32),
        ("inference_tp", 0),
        ("inference_pp", "1"),
        ("generate_sample", "yes"),
    ],
)
def test_bad_export_value_is_refused(field, value):
    with pytest.raises(ConfigError, match=field.replace("_", "[_ ]")):
        ExportConfig(**{"path": "out", field: value})


@pytest.mark.parametrize("dtype", [16, "16", "bf16"])
def test_export_types_of_nemo_are_accepted(dtype):
    assert ExportConfig(path="out", dtype=dtype).dtype == dtype


def test_first_generation_keys_are_translated():
    config = QuantizationConfig.from_any({"algorithm": "fp8", "calib_dataset": "wikitext", "num_calib_size": 8, "decoder_type": "llama"})
    assert (config.calibration_dataset, config.calibration_dataset_size, config.decoder_type) == ("wikitext", 8, "llama")
    export = ExportConfig.from_any({"save_path": "out", "inference_tensor_parallel": 2, "inference_pipeline_parallel": 3})
    assert (export.path, export.inference_tp, export.inference_pp) == (Path("out"), 2, 3)
    assert export == {"path": "out", "inference_tp": 2, "inference_pp": 3}
    assert ExportConfig.from_any({"save_path": "out", "sample_output": False}).generate_sample is False
    assert QuantizationConfig(algorithm="ANY_CFG").algorithm == "ANY_CFG", "ModelOpt's are looked up when torch is there"


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ConfigError, match=r"unknown settings \['algorithmus'\]"):
        QuantizationConfig.from_any({"algorithmus": "fp8"})
    with pytest.raises(ConfigError, match=r"incomplete ExportConfig.*path"):
        ExportConfig.from_any({"dtype": 16})
    with pytest.raises(ConfigError, match="got int"):
        QuantizationConfig.from_any(8)


@given(
    algorithm=st.sampled_from([*ALGORITHMS, None]),
    block=st.integers(1, 256),
    alpha=st.floats(0, 1),
    size=st.integers(1, 1000),
)
def test_mapping_omegaconf_and_dataclass_agree(algorithm, block, alpha, size):
    values = {"algorithm": algorithm, "awq_block_size": block, "sq_alpha": alpha, "calibration_dataset_size": size}
    config = QuantizationConfig(**values)
    assert QuantizationConfig.from_any(values) == config
    assert QuantizationConfig.from_any(OmegaConf.create(values)) == config
    assert QuantizationConfig.from_any(config) is config
    assert config == values
    assert config == OmegaConf.create(values)
    assert hash(config) == hash(QuantizationConfig(**values))


@pytest.mark.parametrize(
    "other", [{"algorithm": "int8"}, {"algorithm": "fp8", "no": 1}, {"algorithm": "wrong"}, ExportConfig(path="x"), 1, None]
)
def test_config_differs_from_what_it_was_not_made_from(other):
    assert (QuantizationConfig(algorithm="fp8") == other) is False


@pytest.mark.parametrize("export_format", EXPORT_FORMATS)
def test_all_formats_of_nemo_are_known(export_format):
    assert ExportConfig(path="out", export_format=export_format).export_format == export_format
