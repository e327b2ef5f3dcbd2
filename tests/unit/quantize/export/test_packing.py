"""Packing against the packers of compressed-tensors and ModelOpt."""

import pytest
import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8

from nemo_opt.quantize.export.codes import Codes
from nemo_opt.quantize.export.description import COMPRESSED_TENSORS, MODELOPT
from nemo_opt.quantize.export.formats import Kind, LinearFormat
from nemo_opt.quantize.export.packing import pack_fp4, pack_int4_rows, pack_int32, stored_tensors

INT4 = LinearFormat(kind=Kind.INT4, block=(1, 8), quantizes_inputs=False)


def _integers(low, high, shape):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


@pytest.mark.parametrize(("num_bits", "columns"), [(4, 64), (4, 20), (8, 64), (8, 6)])
def test_words_are_those_of_compressed_tensors(num_bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = _integers(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1, (6, columns))
    assert torch.equal(pack_int32(values, num_bits), pack_to_int32(values, num_bits))


def test_rows_of_int4_are_packed_as_modelopt_does():
    values = _integers(-8, 7, (6, 16))
    assert torch.equal(pack_int4_rows(values), pack_int4_in_uint8(values.float(), torch.ones(6, 1), 16))


def test_columns_of_e2m1_share_a_byte():
    assert pack_fp4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def _codes(scale_2=None):
    return Codes(values=_integers(-8, 7, (4, 16)), scale=torch.ones(4, 2), scale_2=scale_2)


def _stored(codes, form, method, input_scale=None, pre_quant_scale=None):
    return stored_tensors("linear", codes, form, method, input_scale=input_scale, pre_quant_scale=pre_quant_scale)


def test_names_and_shapes_of_compressed_tensors():
    tensors = _stored(_codes(), INT4, COMPRESSED_TENSORS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "linear.weight_packed": (4, 2),
        "linear.weight_scale": (4, 2),
        "linear.weight_shape": (2,),
    }
    assert tensors["linear.weight_shape"].tolist() == [4, 16]
    fp8 = Codes(values=torch.ones(4, 16).to(torch.float8_e4m3fn), scale=torch.tensor(2.0))
    form = LinearFormat(kind=Kind.FP8, quantizes_inputs=True)
    tensors = _stored(fp8, form, COMPRESSED_TENSORS, torch.tensor(3.0))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "linear.weight": (4, 16),
        "linear.weight_scale": (1,),
        "linear.input_scale": (1,),
    }


def test_names_and_shapes_of_modelopt():
    form = LinearFormat(kind=Kind.W4A8, block=(1, 8), quantizes_inputs=True)
    second = torch.tensor(0.5)
    tensors = _stored(_codes(second), form, MODELOPT, torch.tensor([3.0]), torch.ones(16))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "linear.weight": (2, 16),
        "linear.weight_scale": (4, 2),
        "linear.weight_scale_2": (),
        "linear.input_scale": (),
        "linear.pre_quant_scale": (16,),
    }
    assert tensors["linear.weight_scale_2"].data_ptr() != second.data_ptr()  # files refuse tensors that share memory


@pytest.mark.parametrize(
    ("kind", "quantizes_inputs", "num_bits"), [(Kind.INT4, False, 4), (Kind.INT4, True, 4), (Kind.INT8, False, 8), (Kind.INT8, True, None)]
)
def test_weights_whose_inputs_stay_are_packed(kind, quantizes_inputs, num_bits):
    codes, form = _codes(), LinearFormat(kind=kind, block=(1, 8), quantizes_inputs=quantizes_inputs)
    tensors = _stored(codes, form, COMPRESSED_TENSORS)
    if num_bits is None:
        assert tensors["linear.weight"] is codes.values
    else:
        assert torch.equal(tensors["linear.weight_packed"], pack_int32(codes.values, num_bits))
