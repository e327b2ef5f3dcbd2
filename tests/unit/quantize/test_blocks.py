import modelopt.torch.quantization as mtq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.quantize.blocks import check_blocks, check_recipe_blocks, fitting_blocks
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
