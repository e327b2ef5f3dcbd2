"""Maxima in one pass are ModelOpt's, weights are not looked at again, and what is not finite is named on every rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.calib.max import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.errors import DataError
from nemo_opt.quantize import maxima
from nemo_opt.quantize.maxima import quick_maxima


class Linear(torch.nn.Module):
    """A linear with quantizers that calibrate, its weight collected already as ModelOpt does before a loop."""

    def __init__(self, *, weight_is_known=True):
        super().__init__()
        self.input_quantizer, self.weight_quantizer = TensorQuantizer(), TensorQuantizer()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            quantizer.disable_quant()
            quantizer.enable_calib()
        if weight_is_known:
            self.weight_quantizer(self.weight)

    def forward(self, x):
        return self.input_quantizer(x) @ self.weight_quantizer(self.weight).T


def amax(quantizer):
    return quantizer._calibrator.compute_amax()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(maxima, "on_each", lambda action: [action()])


NUMBERS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(NUMBERS, min_size=2, max_size=6), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_maxima_are_modelopts(batches, dtype):
    ours, theirs = MaxCalibrator(), MaxCalibrator()
    for batch in batches:
        x = torch.tensor(batch, dtype=dtype)
        theirs.collect(x)
        maxima._collect_in_one_pass(ours, x)
    assert ours.compute_amax().shape == theirs.compute_amax().shape
    assert ours.compute_amax().dtype == theirs.compute_amax().dtype
    assert torch.equal(ours.compute_amax(), theirs.compute_amax())


@pytest.mark.parametrize(
    ("calibrator", "x"),
    [
        (MaxCalibrator(axis=0), torch.tensor([[1.0, -3.0], [2.0, 0.5]])),
        (MaxCalibrator(), torch.tensor([1.0, -3.0]).to(torch.float8_e4m3fn)),
        (MaxCalibrator(track_amax=True), torch.tensor([1.0, -3.0])),
        (MaxCalibrator(), torch.ones(2, device="meta")),
    ],
    ids=["by channel", "float8", "tracked", "no numbers"],
)
def test_what_needs_modelopts_way_goes_it(calibrator, x, monkeypatch):
    seen = []
    monkeypatch.setattr(maxima, "_collect", lambda calibrator, x: seen.append(x))
    maxima._collect_in_one_pass(calibrator, x)
    assert len(seen) == 1
    assert seen[0] is x


def test_known_weights_are_not_looked_at_again_and_activations_are(monkeypatch):
    linear, seen = Linear(), []
    real = maxima._collect_in_one_pass
    monkeypatch.setattr(maxima, "_collect_in_one_pass", lambda calibrator, x: (seen.append(tuple(x.shape)), real(calibrator, x)))
    with quick_maxima(linear):
        linear(torch.tensor([[3.0, -4.0]]))
        linear(torch.tensor([[1.0, 1.0]]))
    assert seen == [(1, 2), (1, 2)]
    assert amax(linear.input_quantizer) == 4.0
    assert amax(linear.weight_quantizer) == 2.0
    assert linear.weight_quantizer._if_calib


def test_weights_that_are_not_known_yet_are_collected():
    linear = Linear(weight_is_known=False)
    with quick_maxima(linear):
        linear(torch.tensor([[3.0, -4.0]]))
    assert amax(linear.weight_quantizer) == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_after_the_loop(value):
    linear = Linear()
    with pytest.raises(DataError, match="NaN or infinity at 1 quantizers, first input_quantizer"), quick_maxima(linear):
        linear(torch.tensor([[1.0, 1.0], [value, 1.0]]))


def test_everything_is_as_before_also_after_a_failure():
    linear = Linear()
    collect = MaxCalibrator.collect
    with pytest.raises(AttributeError, match="numel"), quick_maxima(linear):
        linear("words")
    assert MaxCalibrator.collect is collect
    assert linear.weight_quantizer._if_calib


def test_quantizers_that_do_not_calibrate_are_left_alone():
    linear = Linear()
    linear.weight_quantizer.disable_calib()
    with quick_maxima(linear):
        assert not linear.weight_quantizer._if_calib
    assert not linear.weight_quantizer._if_calib


def fail_on_one_rank(rank):
    import torch.distributed as dist

    linear = Linear()
    try:
        with quick_maxima(linear):
            linear(torch.tensor([[math.nan if dist.get_rank() == rank else 1.0, 1.0]]))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_every_rank_hears_of_it(ranks):
    first, second = ranks(2).run(fail_on_one_rank, 1)
    assert first == second
    assert "first input_quantizer" in first
