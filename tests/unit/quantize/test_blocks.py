import modelopt.torch.quantization as mtq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.quantize.blocks import check_blocks, check_recipe_blocks, fitting_blocks, weight_cfgs
from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig
from nemo_opt.quantize.recipes import quant_cfg_of

TINY, LARGE = preset("tiny"), preset("llama3.1-8b")  # tiny: hidden 128, ffn 256, heads of 16


@pytest.mark.parametrize(
    ("settings", "tp", "message"),
    [
        ({"algorithm": "int4_awq"}, 2, "blocks of 128 do not divide the 64 inputs of linear_proj at tp 2: set awq_block_size to 64 or"),
        ({"algorithm": "int4", "awq_block_size": 48}, 1, "blocks of 48 do not divide the 128 inputs of linear_qkv at tp 1.* to 16 or"),
        ({"algorithm": "w4a8_awq", "awq_block_size": 256}, 1, "blocks of 256 do not divide the 128 inputs of linear_qkv"),
        (
            {"algorithm": "block_fp8"},
            1,
            "blocks of 128 do not divide the 16 output rows of a head of.*rows of fp8_block_shape to 16",
        ),
        (
            {"algorithm": "block_fp8", "fp8_block_shape": (16, 128)},
            4,
            "128 do not divide the 32 inputs of linear_proj.*columns of",
        ),
        ({"algorithm": "nvfp4"}, 16, "blocks of 16 do not divide the 8 inputs of linear_proj at tp 16: 8 would fit; use a smaller tp"),
        ({"algorithm": "mxfp8"}, 8, "blocks of 32 do not divide the 16 inputs of linear_proj"),
    ],
)
def test_blocks_that_straddle_are_refused_with_what_fits(settings, tp, message):
    with pytest.raises(ConfigError, match=message):
        check_blocks(QuantizationConfig(**settings), TINY, tp=tp)
    with pytest.raises(ConfigError, match="blocks of"):
        check_recipe_blocks(quant_cfg_of(QuantizationConfig(**settings)), TINY, tp=tp)


ODD = preset("tiny", hidden_size=96, ffn_hidden_size=112, num_attention_heads=4, num_query_groups=2, kv_channels=20)
"""No two sizes are equal: rows 20 (a head), 96 and 112; columns 96, 80 and 112."""


@pytest.mark.parametrize(
    ("shape", "tp", "message"),
    [
        ((3, 1), 1, "blocks of 3 do not divide the 20 output rows of a head of linear_qkv at tp 1: {rows} to 1 or a divisor of it"),
        ((20, 1), 1, "blocks of 20 do not divide the 96 output rows of linear_proj at tp 1: {rows} to 4 or a divisor of it"),
        ((4, 1), 8, "blocks of 4 do not divide the 14 output rows of half of linear_fc1 at tp 8: {rows} to 2 or a divisor of it"),
        ((1, 5), 1, "blocks of 5 do not divide the 96 inputs of linear_qkv at tp 1: {columns} to 1 or a divisor of it"),
        ((1, 16), 2, "blocks of 16 do not divide the 40 inputs of linear_proj at tp 2: {columns} to 8 or a divisor of it"),
        ((1, 4), 8, "blocks of 4 do not divide the 10 inputs of linear_proj at tp 8: {columns} to 2 or a divisor of it"),
    ],
)
def test_the_first_linear_that_does_not_fit_is_named(shape, tp, message):
    config = QuantizationConfig(algorithm="block_fp8", fp8_block_shape=shape)
    said = message.format(rows="set the rows of fp8_block_shape", columns="set the columns of fp8_block_shape")
    with pytest.raises(ConfigError) as refusal:
        check_blocks(config, ODD, tp=tp)
    assert str(refusal.value) == said
    with pytest.raises(ConfigError) as refusal:
        check_recipe_blocks(quant_cfg_of(config), ODD, tp=tp)
    fits = said.split(" to ")[1][0]
    assert str(refusal.value) == f"{said.split(': ')[0]}: {fits} would fit; change the recipe's block_sizes or use a smaller tp"


@pytest.mark.parametrize(
    ("settings", "tp", "remedy"),
    [
        ({"algorithm": "int4", "awq_block_size": 56}, 1, "linear_qkv at tp 1: set awq_block_size to 8 or a divisor of it"),
        ({"algorithm": "int4", "awq_block_size": 32}, 1, "linear_proj at tp 1: set awq_block_size to 16 or a divisor of it"),
        ({"algorithm": "nvfp4"}, 2, "linear_proj at tp 2: 8 would fit; use a smaller tp or another algorithm"),
    ],
)
def test_the_remedy_is_the_algorithms_own(settings, tp, remedy):
    with pytest.raises(ConfigError) as refusal:
        check_blocks(QuantizationConfig(**settings), ODD, tp=tp)
    assert str(refusal.value).endswith(remedy)


def test_the_mlps_inputs_and_outputs_count_too():
    wide = preset("tiny", hidden_size=128, ffn_hidden_size=208, num_attention_heads=8, num_query_groups=4)
    with pytest.raises(ConfigError, match="blocks of 32 do not divide the 208 inputs of linear_fc2 at tp 1"):
        check_blocks(QuantizationConfig(algorithm="mxfp8"), wide, tp=1)
    with pytest.raises(ConfigError, match="blocks of 16 do not divide the 104 output rows of half of linear_fc1 at tp 2"):
        check_blocks(QuantizationConfig(algorithm="block_fp8", fp8_block_shape=(16, 8)), wide, tp=2)
    check_blocks(QuantizationConfig(algorithm="block_fp8", fp8_block_shape=(16, 16)), wide, tp=1)


def test_only_enabled_weight_quantizers_have_weight_attributes():
    sizes = {"block_sizes": {-1: 3}}
    entries = [
        {"quantizer_name": "*weight_quantizer", "cfg": [{"num_bits": 4}, {"num_bits": (4, 3)}]},
        {"quantizer_name": "*fc1.weight_quantizer", "cfg": {"num_bits": 8}, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": sizes},
        {"quantizer_name": "*head.weight_quantizer", "cfg": sizes, "enable": False},
        {"quantizer_name": "*proj.weight_quantizer"},
    ]
    assert [cfg.get("num_bits") for cfg in weight_cfgs({"quant_cfg": entries})] == [4, (4, 3), 8, None]
    check_recipe_blocks({"quant_cfg": entries}, TINY, tp=1)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, None, "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_defaults_fit_a_real_llama(algorithm, tp):
    check_blocks(QuantizationConfig(algorithm=algorithm), LARGE, tp=tp)


@given(
    algorithm=st.sampled_from(ALGORITHMS),
    tp=st.sampled_from([1, 2]),
    block=st.integers(1, 300),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_fitting_blocks_fit_and_are_no_larger(algorithm, tp, block, shape):
    config = QuantizationConfig(algorithm=algorithm, awq_block_size=block, fp8_block_shape=shape)
    fitting = fitting_blocks(config, TINY, tp=tp)
    check_blocks(fitting, TINY, tp=tp)
    check_recipe_blocks(quant_cfg_of(fitting), TINY, tp=tp)
    assert block % fitting.awq_block_size == shape[0] % fitting.fp8_block_shape[0] == shape[1] % fitting.fp8_block_shape[1] == 0


def test_sizes_that_fit_stay():
    config = QuantizationConfig(algorithm="int4_awq", awq_block_size=32, fp8_block_shape=(8, 64))
    assert fitting_blocks(config, TINY, tp=2) == config


def test_recipes_without_blocks_pass():
    check_recipe_blocks(mtq.INT8_DEFAULT_CFG, TINY, tp=2)
