"""Gram statistics against the matrices themselves."""

import pytest
import torch

from nemo_opt.quantize.gram import GramStatistics


def _inputs(count=3, channels=6):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 2, channels, generator=generator) for _ in range(count)]


def _filled(inputs):
    statistics = GramStatistics(inputs[0].shape[-1])
    for x in inputs:
        statistics.add(x)
    statistics.reduce()
    return statistics


def test_the_squared_norm_is_that_of_the_outputs():
    inputs, change = _inputs(), torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    expected = sum((x.flatten(0, 1) @ change.T).pow(2).sum() for x in inputs)
    torch.testing.assert_close(_filled(inputs).squared_norm(change), expected)


def test_means_are_over_tokens_and_zero_rows_are_none():
    inputs = _inputs()
    padded = [torch.cat([x, torch.zeros(3, 2, 6)]) for x in inputs]
    expected = torch.cat([x.flatten(0, 1) for x in inputs]).abs().mean(dim=0)
    for statistics in (_filled(inputs), _filled(padded)):
        assert statistics.tokens == 24
        torch.testing.assert_close(statistics.mean, expected)


def test_a_token_with_any_value_counts_and_is_let_go():
    x = torch.zeros(3, 4, requires_grad=True)
    with torch.no_grad():
        x[0, 1], x[2, 3] = -2.0, 1e-30
    statistics = _filled([x])
    assert statistics.tokens == 2
    assert statistics.mean.tolist() == [0, 1, 0, pytest.approx(5e-31)]
    assert not statistics.mean.requires_grad
    assert not statistics.squared_norm(torch.eye(4)).requires_grad


def test_sums_do_not_depend_on_the_default_type():
    """Megatron-Core and its users may set bfloat16, in which 256 + 1 is 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        statistics = _filled([torch.ones(1, 2, dtype=torch.bfloat16)] * 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert statistics.tokens == 300
    assert statistics.mean.dtype == torch.float32
    assert statistics.mean.tolist() == [1, 1]
    assert statistics.squared_norm(torch.eye(2)) == 600


def test_16_bit_means_are_summed_in_32():
    x = torch.ones(1000, 2, dtype=torch.bfloat16)
    x[0] = 1000
    assert _filled([x]).mean.tolist() == pytest.approx([1.999] * 2)


def test_16_bit_inputs_are_summed_in_32():
    inputs = [x.bfloat16() for x in _inputs(count=200)]
    exact = sum((x.double().flatten(0, 1).T @ x.double().flatten(0, 1)) for x in inputs)
    change = torch.eye(6)
    torch.testing.assert_close(_filled(inputs).squared_norm(change).double(), exact.trace(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value):
    inputs = _inputs()
    assert _filled(inputs).is_finite
    inputs[1][0, 0, 0] = value
    assert not _filled(inputs).is_finite


def test_no_tokens_at_all():
    statistics = _filled([torch.zeros(0, 6)])
    assert statistics.tokens == 0
    assert statistics.is_finite


def test_cleared_statistics_hold_no_matrix():
    statistics = _filled(_inputs())
    statistics.clear()
    assert statistics._gram.shape == (0, 0)


def _cut(how):
    """Squared norm and mean of two ranks that hold columns, or parts of the tokens."""
    import torch.distributed as dist

    inputs, change = _inputs(), torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    rank, group = dist.get_rank(), dist.group.WORLD
    if how == "columns":
        statistics = GramStatistics(3, columns=group)
        own = slice(3 * rank, 3 * rank + 3)
        for x in inputs:
            statistics.add(x[..., own])
    else:
        own = slice(None)
        statistics = GramStatistics(6, **{how: group})
        for x in inputs:
            statistics.add(x[2 * rank : 2 * rank + 2])
    statistics.reduce()
    norm = statistics.squared_norm(change[:, own].contiguous())
    if how == "columns":
        dist.all_reduce(norm)
    return norm, statistics.mean, statistics.tokens


@pytest.mark.ranks
def test_ranks_together_have_the_whole(ranks):
    inputs, change = _inputs(), torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    whole = _filled(inputs)
    for how in ("columns", "parts", "replicas"):
        results = ranks(2).run(_cut, how)
        for rank, (norm, mean, tokens) in enumerate(results):
            torch.testing.assert_close(norm, whole.squared_norm(change))
            torch.testing.assert_close(mean, whole.mean[3 * rank : 3 * rank + 3] if how == "columns" else whole.mean)
            assert tokens == whole.tokens
