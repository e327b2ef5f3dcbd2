"""Integers by pieces are ModelOpt's, to the bit; what it would refuse is refused."""

import inspect
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization import tensor_quant

import nemo_opt.cpu.integer_quant as module
from nemo_opt.cpu.integer_quant import fake_integers


@pytest.fixture(scope="module")
def modelopts():
    """`_tensor_quant` as ModelOpt's file has it, whatever stands in its place here."""
    source = inspect.getsource(tensor_quant)
    text = source[source.index("def _tensor_quant(") :]
    text = text[: text.index("\n\n\n")]
    namespace = {"torch": torch}
    exec(text, namespace)
    return namespace["_tensor_quant"]


SHAPES = {"tensor": (), "one": (1,), "rows": (None, 1), "columns": (1, None), "all": (None, None)}


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 9)),
    st.sampled_from(list(SHAPES)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1, 8, 1 << 17]),
)
@settings(deadline=None, max_examples=200)
def test_results_are_modelopts(modelopts, shape, kind, dtype, bits, narrow, seed, piece):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    places = tuple(size or whole for size, whole in zip(SHAPES[kind], shape, strict=False))
    amax = torch.rand(places, generator=generator) * 6
    amax = torch.where(torch.rand(places, generator=generator) < 0.2, 0.0, amax)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        result = fake_integers(x, amax, bits, narrow)
    assert result.dtype == dtype
    assert torch.equal(result, modelopts(x, amax, bits, False, narrow))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
def test_special_values_too(modelopts, value):
    x = torch.tensor([value, 1.0, -5.0])
    for amax in (torch.tensor(2.0), torch.tensor(0.0), torch.tensor([1.0, 0.0, 2.0])):
        torch.testing.assert_close(fake_integers(x, amax), modelopts(x, amax), rtol=0, atol=0, equal_nan=True)


def test_a_negative_amax_is_refused_as_there(modelopts):
    for function in (fake_integers, modelopts):
        with pytest.raises(ValueError, match="Negative values in amax"):
            function(torch.ones(2), torch.tensor(-1.0))


def test_it_stands_in_modelopts_place(modelopts):
    assert isinstance(tensor_quant._tensor_quant, types.FunctionType)
    x, amax = torch.randn(5, 6), torch.rand(5, 1)
    assert torch.equal(tensor_quant._tensor_quant(x, amax, 8, False, True), modelopts(x, amax))
    assert torch.equal(tensor_quant._tensor_quant(x.abs(), amax, 8, True, True), modelopts(x.abs(), amax, 8, True))
    assert tensor_quant._tensor_quant(torch.empty(0, 6), torch.ones(())).shape == (0, 6)
    with pytest.raises(TypeError, match="unsigned"):
        tensor_quant._tensor_quant(x - 10, amax, 8, True)
