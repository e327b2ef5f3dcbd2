"""Bits per weight added up from formats and shapes; tests/unit/quantize/test_sqnr.py has them of real models and layouts."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from nemo_opt.quantize import bits
from nemo_opt.quantize.bits import BitsPerWeight, bits_per_weight, element_bits


def _quantizer(*levels):
    quantizers = [TensorQuantizer(QuantizerAttributeConfig(**level)) for level in levels]
    return quantizers[0] if len(quantizers) == 1 else SequentialQuantizer(*quantizers)


FP8 = {"num_bits": (4, 3)}
INT4 = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
BLOCK_FP8 = {"num_bits": (4, 3), "block_sizes": {-1: 16, -2: 8}}
QUANTIZERS = {"b.weight_quantizer": _quantizer(INT4), "a.weight_quantizer": _quantizer(FP8), "c.weight_quantizer": _quantizer(BLOCK_FP8)}
SIZES = {"a.weight": (4, 64), "b.weight_w": (8, 64), "b.weight_v": (8, 64), "c.weight": (16, 64), "embedding": (10, 10), "norm": (64,)}
SCALES = {
    "a.weight_quantizer._amax": (1,),
    "b.weight_quantizer._amax_w": (8, 2),
    "b.weight_quantizer._amax_v": (8, 2),
    "c.weight_quantizer._amax": (2, 4),
    "b.input_quantizer._pre_quant_scale": (64,),
}


def _measured(quantizers=QUANTIZERS, others=()):
    """Of shapes; `others` is what further ranks say, in order of the collectives."""

    def shards(shapes):
        return [SimpleNamespace(key=key, global_shape=shape) for key, shape in shapes.items()]

    said = iter(others)

    def on_each(action):
        return [action(), next(said)] if others else [action()]

    with (
        patch.object(bits, "quantized_weights", return_value=[(name, None, quantizer) for name, quantizer in quantizers.items()]),
        patch.object(bits, "parameter_shards", return_value=shards(SIZES)),
        patch.object(bits, "quantizer_shards", return_value=shards(SCALES)),
        patch.object(bits, "on_each", on_each),
    ):
        return bits_per_weight([])


def test_weights_and_their_scales_are_added_up():
    result = _measured()
    total = {"a": 256 * 8 + 32, "b": 1024 * 4 + 32 * 16, "c": 1024 * 8 + 8 * 32}
    assert list(result.by_name.items()) == [
        ("a.weight_quantizer", pytest.approx(total["a"] / 256)),
        ("b.weight_quantizer", pytest.approx(total["b"] / 1024)),
        ("c.weight_quantizer", pytest.approx(total["c"] / 1024)),
    ]
    assert result.quantized == pytest.approx(sum(total.values()) / 2304)
    assert result.model == pytest.approx((sum(total.values()) + 16 * 164) / (2304 + 164))
    assert result.block == "32, 8x16"


def test_without_quantised_weights_every_parameter_has_16_bits():
    assert _measured({}) == BitsPerWeight(quantized=None, model=16, by_name={}, block="")


def test_other_ranks_hold_other_weights():
    form = bits._format(_quantizer(FP8))
    result = _measured(others=[{"d.weight_quantizer": form}, {"d.weight": 100}, {"d.weight_quantizer._amax": 1}])
    assert list(result.by_name) == ["a.weight_quantizer", "b.weight_quantizer", "c.weight_quantizer", "d.weight_quantizer"]
    assert result.by_name["d.weight_quantizer"] == pytest.approx(8 + 32 / 100)


def test_block_scales_made_from_the_data_have_8_bits():
    form = bits._format(_quantizer(NVFP4))
    assert (form.element_bits, form.dynamic_block, form.block) == (4, 16, "16")
    assert bits._bits("w", 160, {"w._amax": 1}, form) == 160 * 4 + 10 * 8 + 32


@pytest.mark.parametrize(("num_bits", "expected"), [(8, 8), (4, 4), ((4, 3), 8), ((2, 1), 4), ((5, 2), 8)])
def test_floats_have_a_sign(num_bits, expected):
    assert element_bits(num_bits) == expected


def test_results_are_made_by_name_and_stay_as_they_are():
    result = _measured({})
    with pytest.raises(AttributeError):
        result.model = 8
    with pytest.raises(TypeError, match="positional"):
        BitsPerWeight(None, 16, {}, "")
