"""`Linear` against plain torch, its options, and its two cuts on two ranks."""

import pytest
import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.linear import Linear
from nemo_opt.errors import ConfigError
from nemo_opt.testing.ranks import RankPools

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums of 16 terms in another order differ by about 1e-15


def _grads(out, *tensors):
    direction = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    return torch.autograd.grad((out * direction).sum(), tensors)


def _input(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


@pytest.mark.parametrize("mode", [None, "column", "row"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(mode, bias):
    torch.manual_seed(0)
    module = Linear(8, 6, bias=bias, parallel_mode=mode, params_dtype=torch.float64)
    x = _input(3, 2, 8)
    tensors = [x, module.weight] + ([module.bias] if bias else [])
    expected = functional.linear(x, module.weight, module.bias if bias else None)
    out = module(x)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(_grads(out, *tensors), _grads(expected, *tensors), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, **EXACT)


def test_gradients_pass_the_numerical_check():
    module = Linear(4, 3, params_dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (_input(2, 4), module.weight, module.bias))


def test_returned_bias_is_not_added():
    module = Linear(4, 3, return_bias=True, params_dtype=torch.float64)
    torch.nn.init.ones_(module.bias)
    x = _input(2, 4)
    out, bias = module(x)
    torch.testing.assert_close(out, x @ module.weight.t(), **EXACT)
    assert bias is module.bias


def test_without_bias_there_is_an_empty_tensor_and_no_parameter():
    module = Linear(4, 3, bias=False)
    assert module.bias.numel() == 0
    assert list(module.state_dict()) == ["weight", "_extra_state"]


def test_frozen_weights_get_no_gradient():
    module = Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(
    "option",
    [
        {"ub_overlap_ag": True},
        {"ub_overlap_rs": True},
        {"ub_overlap_rs_dgrad": True},
        {"ub_bulk_dgrad": True},
        {"ub_bulk_wgrad": True},
        {"delay_wgrad_compute": True},
        {"symmetric_ar_type": "two_shot"},
        {"parameters_split": ("a", "b")},
        {"parallel_mode": "diagonal"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_that_need_a_gpu_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        Linear(4, 4, **option)


def test_fp8_results_are_refused():
    with pytest.raises(ConfigError, match="fp8_output"):
        Linear(4, 4)(torch.zeros(1, 4), fp8_output=True)


def test_mixed_types_are_refused_and_autocast_casts():
    module = Linear(4, 3)
    x = torch.randn(2, 4)
    with pytest.raises(ConfigError, match="bfloat16"):
        module(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, functional.linear(x.bfloat16(), module.weight.bfloat16(), module.bias.bfloat16()))


def test_main_grad_collects_what_autograd_would():
    module = Linear(4, 3, bias=False, fuse_wgrad_accumulation=True)
    x = torch.randn(2, 4)
    with pytest.raises(ConfigError, match="main_grad"):
        module(x)
    module.weight.main_grad = torch.ones(3, 4)
    module.weight.grad_added_to_main_grad = False
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.main_grad, 1 + x.sum(0).expand(3, 4))
    assert module.weight.grad_added_to_main_grad


def test_main_grad_of_a_weight_without_the_flag_leaves_a_zero_gradient():
    module = Linear(4, 3, bias=False, fuse_wgrad_accumulation=True)
    module.weight.main_grad = torch.zeros(3, 4)
    module(torch.ones(2, 4)).sum().backward()
    assert module.weight.main_grad.eq(2).all()
    assert module.weight.grad.eq(0).all()


class _Tracker:
    def __init__(self):
        self.names = []

    def fork(self, name="default"):
        self.names.append(name)
        return torch.random.fork_rng(devices=[])


def test_weights_are_made_under_the_tracker():
    tracker = _Tracker()
    Linear(4, 3, get_rng_state_tracker=lambda: tracker, bias=False)
    Linear(4, 3, get_rng_state_tracker=lambda: tracker, rng_tracker_name="expert", bias=False)
    assert tracker.names == ["default", "expert"]


def test_meta_parameters_get_memory_when_reset():
    module = Linear(4, 3, device="meta", init_method=lambda w: w.fill_(2.0), parallel_mode="row")
    assert module.weight.is_meta
    module.reset_parameters()
    assert module.weight.eq(2).all()
    assert module.bias.eq(0).all()
    assert module.weight.partition_dim == 1


def test_cuts_and_their_attributes():
    column = Linear(8, 6, tp_size=2, parallel_mode="column")
    row = Linear(8, 6, tp_size=2, parallel_mode="row", sequence_parallel=True)
    assert (column.out_features, column.in_features, row.out_features, row.in_features) == (3, 8, 6, 4)
    assert (column.weight.partition_dim, column.bias.partition_dim, row.weight.partition_dim) == (0, 0, 1)
    assert column.weight.tensor_model_parallel
    assert row.bias.sequence_parallel
    with pytest.raises(ConfigError, match="do not divide"):
        Linear(8, 5, tp_size=2, parallel_mode="column")
    with pytest.raises(ConfigError, match="tp_group is None"):
        column(torch.zeros(1, 8))


def test_extra_state_is_empty_and_foreign_state_is_kept():
    module = Linear(4, 3)
    assert module.state_dict()["_extra_state"].numel() == 0
    foreign = torch.arange(5, dtype=torch.uint8)
    module.load_state_dict({**module.state_dict(), "_extra_state": foreign})
    assert module.get_extra_state().tolist() == [0, 1, 2, 3, 4]
    module.set_extra_state(None)
    with pytest.raises(ConfigError, match="BytesIO"):
        module.set_extra_state(__import__("io").BytesIO())


def _two_cut_products(sequence_parallel):
    """Column and row parallel products in a row, on this rank; returns this rank's parts of all values and gradients."""
    import torch.distributed as dist

    group, rank = dist.group.WORLD, dist.get_rank()
    kwargs = {"tp_group": group, "sequence_parallel": sequence_parallel, "params_dtype": torch.float64}
    up = Linear(8, 6, parallel_mode="column", **kwargs)
    down = Linear(6, 8, parallel_mode="row", **kwargs)
    whole = _whole_weights()
    with torch.no_grad():
        up.weight.copy_(whole["up.weight"].chunk(2)[rank])
        up.bias.copy_(whole["up.bias"].chunk(2)[rank])
        down.weight.copy_(whole["down.weight"].chunk(2, dim=1)[rank])
        down.bias.copy_(whole["down.bias"])
    x = _input(4, 3, 8).detach()
    x = (x.chunk(2)[rank] if sequence_parallel else x).requires_grad_()
    out = down(torch.tanh(up(x)))
    direction = torch.cos(torch.arange(96, dtype=torch.float64)).reshape(4, 3, 8)
    direction = direction.chunk(2)[rank] if sequence_parallel else direction
    tensors = {"x": x, "up.weight": up.weight, "up.bias": up.bias, "down.weight": down.weight, "down.bias": down.bias}
    grads = torch.autograd.grad((out * direction).sum(), list(tensors.values()))
    return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}


def _whole_weights():
    generator = torch.Generator().manual_seed(1)
    shapes = {"up.weight": (6, 8), "up.bias": (6,), "down.weight": (8, 6), "down.bias": (8,)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(ranks: RankPools, sequence_parallel):
    whole = {name: tensor.requires_grad_() for name, tensor in _whole_weights().items()}
    x = _input(4, 3, 8)
    out = functional.linear(
        torch.tanh(functional.linear(x, whole["up.weight"], whole["up.bias"])), whole["down.weight"], whole["down.bias"]
    )
    direction = torch.cos(torch.arange(96, dtype=torch.float64)).reshape(4, 3, 8)
    tensors = {"x": x, **whole}
    expected = dict(zip(tensors, torch.autograd.grad((out * direction).sum(), list(tensors.values())), strict=True))
    parts = ranks(2).run(_two_cut_products, sequence_parallel)

    def joined(name, dim):
        return torch.cat([part[name] for part in parts], dim)

    for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        torch.testing.assert_close(joined(name, dim), expected[name], **EXACT)
    if sequence_parallel:
        torch.testing.assert_close(joined("out", 0), out, **EXACT)
        torch.testing.assert_close(joined("x", 0), expected["x"], **EXACT)
        # The bias of the second product sees each rank's tokens: Megatron-Core sums it, as its sequence_parallel attribute says.
        torch.testing.assert_close(parts[0]["down.bias"] + parts[1]["down.bias"], expected["down.bias"], **EXACT)
    else:
        for part in parts:
            torch.testing.assert_close(part["out"], out.detach(), **EXACT)
            torch.testing.assert_close(part["x"], expected["x"], **EXACT)
            torch.testing.assert_close(part["down.bias"], expected["down.bias"], **EXACT)
