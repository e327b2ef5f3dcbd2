"""AWQ's search against one by hand, and what it shares with which ranks, all in one process; layouts are compared in test_awq.py."""

import copy
from types import SimpleNamespace
from unittest.mock import patch

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.mode import AWQLiteModeDescriptor

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.quantize import awq
from nemo_opt.quantize.blocks import weight_cfgs

BLOCK = 8
ALPHAS = [step / 10 for step in range(11)]


class _Linears(torch.nn.Module):
    """Linears that see the same tokens, two of which are padding; the last sees none."""

    def __init__(self, rows=12, columns=20):
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.x = torch.randn(2, 15, columns, generator=generator) * torch.logspace(-1.5, 1.5, columns)
        self.x[:, 7] = 0
        for name in ("first", "second", "unseen"):
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight.data = torch.randn(rows, columns, generator=generator) * torch.logspace(0.5, -0.5, columns).roll(3)
            self.add_module(name, linear)

    def forward(self):
        return self.first(self.x), self.second(self.x[:, :9])


def _inserted(fmt):
    """The linears with quantizers of a format, not calibrated."""
    quant_cfg = copy.deepcopy(getattr(mtq, fmt))
    for cfg in weight_cfgs(quant_cfg):
        if "block_sizes" in cfg:
            cfg["block_sizes"][-1] = BLOCK
    return mtq.quantize(_Linears(), quant_cfg | {"algorithm": None})


def _rounded(fmt, weight):
    """The format by its definition."""
    if fmt == "FP8_DEFAULT_CFG":
        step = weight.abs().max() / 448
        return (weight / step).to(torch.float8_e4m3fn).float() * step
    bits, size = (8, weight.shape[1]) if fmt == "INT8_DEFAULT_CFG" else (4, BLOCK)
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).view(len(weight), -1, size)
    largest = 2 ** (bits - 1) - 1
    step = blocks.abs().amax(dim=2, keepdim=True) / largest
    rounded = (blocks / step.where(step > 0, 1.0)).round().clamp(-largest - 1, largest) * step
    return rounded.view(len(weight), -1)[:, : weight.shape[1]]


def _by_hand(fmt, weight, x):
    """(alpha, scale) of the least error of the outputs, tried one by one."""
    x = x.flatten(0, 1)
    size = weight.shape[1] if fmt in ("FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG") else BLOCK
    largest = torch.cat([part.abs().amax(dim=1, keepdim=True).expand_as(part) for part in weight.split(size, dim=1)], dim=1)
    activation, profile = x.abs().mean(dim=0) * len(x) / (x != 0).any(dim=1).sum(), (weight.abs() / largest).mean(dim=0)
    tried = []
    for alpha in ALPHAS:
        scale = (activation**alpha / profile ** (1 - alpha)).clamp(1e-4, 1e4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        change = _rounded(fmt, weight * scale) / scale - weight
        tried.append((float((x @ change.T).pow(2).sum()), alpha, scale))
    return min(tried, key=lambda entry: entry[0])[1:]


@pytest.mark.parametrize("fmt", ["INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
def test_the_alpha_is_the_one_whose_outputs_differ_least(fmt):
    before, model, calls = _Linears(), _inserted(fmt), []
    found = awq.calibrate_awq(model, lambda model: calls.append(model()))
    assert len(calls) == 1
    assert 0 < found["first"] < 1, "the ends would be found by chance"
    for name, x in (("first", before.x), ("second", before.x[:, :9])):
        linear, weight = getattr(model, name), getattr(before, name).weight.detach()
        alpha, scale = _by_hand(fmt, weight, x)
        assert found[name] == pytest.approx(alpha)
        torch.testing.assert_close(linear.input_quantizer.pre_quant_scale, 1 / scale)
        torch.testing.assert_close(linear.weight.detach(), weight * scale)
        assert linear.weight_quantizer.is_enabled
        torch.testing.assert_close(linear.weight_quantizer(linear.weight).detach(), _after(fmt, weight * scale), rtol=1e-4, atol=1e-5)
        levels = linear.weight_quantizer if fmt.startswith("W4A8") else [linear.weight_quantizer]
        assert all(level.amax is not None for level in levels), "of both formats"
        if linear.input_quantizer.is_enabled:
            assert linear.input_quantizer.axis is None
            torch.testing.assert_close(linear.input_quantizer.amax, (x / scale).abs().max())


def _after(fmt, weight):
    """Through both of W4A8's formats."""
    return _rounded("FP8_DEFAULT_CFG", _rounded(fmt, weight)) if fmt.startswith("W4A8") else _rounded(fmt, weight)


@pytest.mark.parametrize("fmt", ["INT4_AWQ_CFG", "FP8_DEFAULT_CFG"])
def test_what_no_token_came_to_is_left_as_it_is(fmt):
    model = _inserted(fmt)
    assert awq.calibrate_awq(model, lambda model: model())["unseen"] == 0
    assert model.unseen.input_quantizer.pre_quant_scale.tolist() == [1.0] * 20
    assert torch.equal(model.unseen.weight, _Linears().unseen.weight)


def test_a_coarser_step_tries_fewer():
    found = awq.calibrate_awq(_inserted("INT4_AWQ_CFG"), lambda model: model(), alpha_step=0.5)
    assert set(found.values()) <= {0.0, 0.5, 1.0}


def test_linears_with_disabled_weight_quantizers_are_left_out():
    model = _inserted("INT4_AWQ_CFG")
    model.second.weight_quantizer.disable()
    assert list(awq.calibrate_awq(model, lambda model: model())) == ["first", "unseen"]
    assert model.second.input_quantizer.pre_quant_scale is None
    assert torch.equal(model.second.weight, _Linears().second.weight)


def test_several_experts_are_refused_before_any_work():
    with (
        patch.object(awq, "_searched", return_value=[("fc1", SimpleNamespace(weight=1)), ("experts.fc1", SimpleNamespace())]),
        pytest.raises(ConfigError, match=r"^AWQ cannot scale experts.fc1,"),
    ):
        awq.calibrate_awq(None, None)


@pytest.mark.parametrize(("axis", "refused"), [(0, True), (-1, False), (None, False)])
def test_activations_along_another_axis_are_refused(axis, refused):
    model = _inserted("W4A8_AWQ_BETA_CFG")
    model.second.input_quantizer.axis = axis
    if refused:
        with pytest.raises(ConfigError, match=r"second: AWQ needs activations .* axis 0"):
            awq._Search("second", model.second)
        model.second.input_quantizer.disable()
    assert awq._Search("second", model.second).quantizes_input is not refused


def test_nan_is_refused_with_the_count_and_the_first():
    model = _inserted("INT4_AWQ_CFG")
    model.x[0, 12] = float("nan")
    with pytest.raises(DataError, match=r"^1 linears have inputs that are not finite, first first"):
        awq.calibrate_awq(model, lambda model: model())


def test_upstreams_search_is_back_after_a_failure():
    before = AWQLiteModeDescriptor._calib_func
    with pytest.raises(ZeroDivisionError):
        awq.calibrate_awq(_inserted("INT4_AWQ_CFG"), lambda model: 1 / 0)
    assert AWQLiteModeDescriptor._calib_func is before
    awq.calibrate_awq(_inserted("INT4_AWQ_CFG"), lambda model: model())
    assert AWQLiteModeDescriptor._calib_func is before


def test_statistics_are_of_the_one_pass_and_reduced_once():
    model, passes = _inserted("INT4_AWQ_CFG"), []

    def loop(model):
        passes.append([model.first.weight_quantizer.is_enabled, model()])

    search = awq._Search("first", model.first)
    with patch.object(search.statistics, "reduce") as reduce, torch.no_grad():
        awq._observe(model, loop, [search])
    reduce.assert_called_once_with()
    assert passes[0][0] is False, "the inputs are those of the unquantised model"
    assert search.statistics.tokens == 28
    model()
    assert search.statistics.tokens == 28
    assert model.first.weight_quantizer.is_enabled
    assert model.first.weight_quantizer.amax is None


def test_weights_in_16_bits_are_searched_in_32():
    model = _inserted("INT4_AWQ_CFG")
    model.x = model.x.bfloat16()
    model.bfloat16()
    before = model.first.weight.detach().clone()
    found = awq.calibrate_awq(model, lambda model: model())
    alpha, scale = _by_hand("INT4_AWQ_CFG", before.float(), model.x.float())
    assert found["first"] == pytest.approx(alpha)
    torch.testing.assert_close(model.first.input_quantizer.pre_quant_scale.float(), 1 / scale, rtol=2**-7, atol=0)
    assert not model.first.weight_quantizer.amax.requires_grad


class _Group:
    """Two tensor-parallel ranks, the other of which has just what this one has, or maxima four times as large."""

    world = 2

    def __init__(self):
        self.calls = []

    def size(self):
        return self.world

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        if group is None:  # ModelOpt's own, in a world of one that other tests may have opened in this process
            return
        assert group is self
        self.calls.append("max" if op == torch.distributed.ReduceOp.MAX else "sum")
        tensor.mul_(4 if op == torch.distributed.ReduceOp.MAX else 2)


def _search(fmt, kind):
    group, search = _Group(), awq._Search("first", _inserted(fmt).first)
    search.tp_group, search.is_row, search.is_column = group, kind == "row", kind == "column"
    return search, group


@pytest.mark.parametrize(
    ("fmt", "kind", "calls", "factor"),
    [
        ("INT4_AWQ_CFG", "column", ["sum"], 1.0),  # twice the sum over twice the rows
        ("INT4_AWQ_CFG", "row", [], 1.0),  # blocks lie on one rank
        ("INT8_DEFAULT_CFG", "row", ["max"], 0.25),
        ("INT8_DEFAULT_CFG", "column", ["sum"], 1.0),
    ],
)
def test_profiles_of_weights_are_over_all_ranks(fmt, kind, calls, factor):
    alone = awq._Search("first", _inserted(fmt).first)._weight_profile()
    search, group = _search(fmt, kind)
    with patch.object(awq.dist, "all_reduce", group.all_reduce):
        torch.testing.assert_close(search._weight_profile(), alone * factor)
    assert group.calls == calls


@pytest.mark.parametrize(
    ("fmt", "kind", "calls"),
    [
        ("INT4_AWQ_CFG", "row", []),
        ("INT4_AWQ_CFG", "column", []),
        ("FP8_DEFAULT_CFG", "row", ["max"]),
        ("FP8_DEFAULT_CFG", "column", ["max"]),
        ("INT8_DEFAULT_CFG", "row", ["max"]),
        ("INT8_DEFAULT_CFG", "column", []),  # rows are whole
    ],
)
def test_weights_are_rounded_by_the_amax_of_all_ranks(fmt, kind, calls):
    search, group = _search(fmt, kind)
    weight = search.linear.weight.detach()
    with patch.object(awq.dist, "all_reduce", group.all_reduce):
        rounded = search._quantised(weight)
    assert group.calls == calls
    assert search.linear.weight_quantizer.amax is None, "the next alpha's must not find it"
    expected = _rounded(fmt, weight)
    if calls:  # the values between a quarter of the amax and the amax are none of this rank's
        biggest = weight.abs().amax(dim=1, keepdim=True) if fmt.startswith("INT8") else weight.abs().max()
        expected = _rounded(fmt, torch.cat([weight, 4 * biggest.expand(len(weight), 1)], dim=1))[:, :-1]
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-6)


def test_ends_of_scales_are_of_all_columns():
    scale = torch.tensor([1.0, 4.0, 16.0])
    alone = awq._Search("first", _inserted("INT4_AWQ_CFG").first)
    torch.testing.assert_close(alone._normalised(scale), scale / 4)
    for kind, calls, factor in (("column", [], 1), ("row", ["max"], 4)):  # the reduced ends are 64 and -4
        search, group = _search("INT4_AWQ_CFG", kind)
        with patch.object(awq.dist, "all_reduce", group.all_reduce):
            torch.testing.assert_close(search._normalised(scale), scale / 4 / factor)
        assert group.calls == calls


def test_losses_are_summed_once_over_ranks():
    search, group = _search("INT4_AWQ_CFG", "column")
    search.statistics.add(_Linears().x)
    with patch.object(awq.dist, "all_reduce", group.all_reduce):
        alpha = search.finish(ALPHAS)
    assert group.calls == ["sum", "sum"], "the profile, and all alphas' losses"
    assert alpha == _by_hand("INT4_AWQ_CFG", _Linears().first.weight.detach(), _Linears().x)[0]
    assert search.statistics._gram.numel() == 0


@pytest.mark.parametrize(
    ("name", "kind", "tp", "sp", "columns", "parts"),
    [
        ("fc2", "row", 2, True, True, False),
        ("fc2", "row", 1, True, False, False),
        ("fc1", "column", 2, True, False, True),
        ("fc1", "column", 2, False, False, False),
        ("fc1", "column", 1, True, False, False),
        ("mlp.experts.local_experts.0.fc1", "column", 2, True, False, False),  # routed tokens are not cut
        ("mlp.experts.local_experts.0.fc2", "row", 2, True, True, False),
        ("router", "neither", 2, True, False, False),
    ],
)
@pytest.mark.parametrize("dp", [True, False])
def test_statistics_are_summed_over_the_ranks_that_see_other_tokens_or_columns(name, kind, tp, sp, columns, parts, dp):
    def group(what, is_initialized, size=2):
        return SimpleNamespace(group=what, is_initialized=lambda: is_initialized, world_size=lambda: size)

    linear = SimpleNamespace(
        weight=torch.zeros(3, 5),
        input_quantizer=SimpleNamespace(is_enabled=False),
        sequence_parallel=sp,
        parallel_state=SimpleNamespace(tensor_parallel_group=group("tp", tp > 0, tp), data_parallel_group=group("dp", dp)),
    )
    with (
        patch.object(awq, "is_quantized_row_parallel_linear", return_value=kind == "row"),
        patch.object(awq, "is_quantized_column_parallel_linear", return_value=kind == "column"),
        patch.object(awq, "GramStatistics") as statistics,
    ):
        search = awq._Search(name, linear)
    expected = {"columns": "tp" if columns else None, "parts": "tp" if parts else None, "replicas": "dp" if dp else None}
    statistics.assert_called_once_with(5, **expected, device=linear.weight.device)
    assert search.tp_group == ("tp" if tp == 2 and kind != "neither" else None)


def test_groups_that_are_not_there_are_not_used():
    linear = _inserted("INT4_AWQ_CFG").first
    linear._is_column_parallel = True
    assert awq._Search("first", linear).tp_group is None


def test_blocks_by_either_name_of_the_last_dim():
    assert awq._block_size(SimpleNamespace(block_sizes=None)) is None
    assert awq._block_size(SimpleNamespace(block_sizes={-1: 16, "type": "static"})) == 16
    assert awq._block_size(SimpleNamespace(block_sizes={1: 32})) == 32


@pytest.mark.parametrize(
    ("block_sizes", "axis", "shape"),
    [
        (None, None, ()),
        (None, 0, (3, 1)),
        ({-1: 4, "type": "dynamic"}, None, ()),
        ({-1: 4, "type": "static"}, None, None),
        ({-1: 4}, None, None),
    ],
)
def test_amax_that_other_ranks_may_raise(block_sizes, axis, shape):
    weight = torch.arange(-6.0, 6).view(3, 4)
    amax = awq._amax_beyond_blocks(SimpleNamespace(block_sizes=block_sizes, axis=axis), weight)
    assert (amax is None) == (shape is None)
    if amax is not None:
        assert torch.equal(amax, weight.abs().amax(dim=1, keepdim=True) if shape else torch.tensor(6.0))
