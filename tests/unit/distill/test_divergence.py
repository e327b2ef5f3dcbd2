"""The fused divergences against the formulas in float64, on one rank and with the vocabulary split."""

import nemo_opt._stack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.distill import divergence as module
from nemo_opt.distill.config import LOGIT_LOSSES as KINDS
from nemo_opt.distill.divergence import divergence
from nemo_opt.distill.top_k import largest_logits
from nemo_opt.errors import ConfigError

TOL_LOSS = 1e-5
"""Relative to 1 + the loss. Float32 logits of up to 30, as drawn here, are rounded by 2e-6, which a loss of 0 inherits; seen: 1.8e-6."""
TOL_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
"""Relative to 1 + the largest entry: gradients are differences of probabilities (reverse KL: times log-ratios of up to 60) and inherit
their rounding where they vanish. Float32: seen 3.2e-6. Bfloat16 rounds twice, each time by 2^-8, so 8e-3; seen 6.8e-3."""


def dense(student, teacher, kind, temperature):
    """The definitions, in float64."""
    q, p = (torch.log_softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    m = torch.logaddexp(p, q) - torch.tensor(2.0).double().log()

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "jensen_shannon": lambda: (kl(p, m) + kl(q, m)) / 2}[kind]()


def draw(*shape, seed=0, dtype=torch.float32, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator).mul_(spread).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randn(shape[:-1], generator=generator)


def worst(ours, theirs):
    return float((ours.double() - theirs).abs().max() / (1 + theirs.abs().max()))


def check(student, teacher, weights, kind, temperature, columns=None, **options):
    theirs = student.detach().clone().requires_grad_()
    expected = dense(theirs[..., :columns], teacher[..., :columns].clone(), kind, temperature)
    (expected * weights).sum().backward()
    losses = divergence(student, teacher, kind=kind, temperature=temperature, vocab_size=columns, **options)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32
    assert float(losses.detach().min()) > -TOL_LOSS
    assert worst(losses.detach(), expected.detach()) < TOL_LOSS
    assert student.grad.dtype == student.dtype
    assert worst(student.grad, theirs.grad.double()) < TOL_GRADIENT[student.dtype]


shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 70))


@settings(max_examples=60, deadline=None)  # the first call loads kernels
@given(shapes, st.sampled_from(KINDS), st.floats(0.5, 4.0), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.data())
def test_value_and_gradient_are_those_of_the_formula(shape, kind, temperature, dtype, overwrite, data):
    columns = data.draw(st.one_of(st.none(), st.integers(2, shape[-1])))
    check(*draw(*shape, dtype=dtype), kind, temperature, columns, overwrite_teacher=overwrite)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_in_blocks(kind, monkeypatch):
    monkeypatch.setitem(module._BLOCK, "cpu", (3 * 40, 3 * 40))
    check(*draw(5, 2, 40), kind, 1.5)
    check(*draw(1, 1, 500), kind, 1.0)  # a row is longer than a block


@given(st.integers(0, 5000), st.integers(0, 200_000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_buffers_of_a_block_are_small(rows, columns, dtype):
    logits = torch.empty(rows, columns, dtype=dtype, device="meta")
    blocks = module._blocks(logits)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    least, most = module._BLOCK["cpu"]
    wanted = min(max(logits.numel() * logits.element_size() / 27 / 12, least), most)
    assert all((block.stop - block.start) * columns <= max(wanted, columns) for block in blocks)
    assert sum((block.stop - block.start + 1) * columns <= wanted for block in blocks) <= 1, "only the last is smaller"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [30.0, 3e4])
def test_large_logits_overflow_nothing(kind, size):
    student, teacher, _ = draw(4, 1, 50, spread=size)
    divergence(student, teacher, kind=kind).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_teaches_nothing(kind):
    _, teacher, _ = draw(4, 2, 50)
    student = teacher.clone().requires_grad_()
    losses = divergence(student, teacher, kind=kind, temperature=1.7)
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-7
    assert float(student.grad.abs().max()) < 1e-7


def test_logits_without_a_gradient_get_none():
    student, teacher, _ = draw(2, 2, 9)
    with torch.no_grad():
        assert not divergence(student, teacher).requires_grad
    assert not divergence(student.detach(), teacher).requires_grad


def test_masked_tokens_contribute_nothing_whatever_they_hold():
    student, teacher, _ = draw(3, 2, 9)
    teacher[1] = float("nan")
    losses = divergence(student, teacher)
    torch.where(torch.tensor([[True], [False], [True]]), losses, 0.0).sum().backward()
    assert (student.grad[1] == 0).all()
    assert (student.grad[[0, 2]] != 0).any()


def test_the_gradient_lies_in_the_teachers_logits_only_if_it_may():
    for dtype, overwrites in ((torch.float32, True), (torch.bfloat16, False)):
        student, teacher, _ = draw(2, 2, 9, dtype=dtype)
        teacher = teacher.float()
        before = teacher.clone()
        divergence(student, teacher, overwrite_teacher=True).sum().backward()
        assert torch.equal(student.grad, teacher) == overwrites
        assert torch.equal(before, teacher) != overwrites
    student, teacher, _ = draw(2, 2, 9)
    before = teacher.clone()
    divergence(student, teacher).sum().backward()
    assert torch.equal(before, teacher)


def test_it_is_differentiated_once():
    student, teacher, _ = draw(2, 2, 9)
    loss = divergence(student, teacher).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_bad_input_is_refused():
    student, teacher, _ = draw(2, 2, 9)
    with pytest.raises(ConfigError, match=r"unknown divergence 'kl'; known are \['forward_kl'"):
        divergence(student, teacher, kind="kl")
    with pytest.raises(ConfigError, match=r"\[2, 2, 9\], of the teacher \[2, 2, 8\]"):
        divergence(student, teacher[..., :8])


@settings(deadline=None)
@given(shapes, st.data())
def test_likeliest_tokens(shape, data):
    student, teacher, _ = draw(*shape)
    columns = data.draw(st.integers(1, shape[-1]))
    k = data.draw(st.integers(1, columns))
    of_student, of_teacher = largest_logits(student, teacher, k, vocab_size=columns)
    values, indices = teacher[..., :columns].sort(-1, descending=True)
    assert torch.equal(of_teacher.sort(-1, descending=True)[0], values[..., :k])
    assert torch.equal(of_student.sort(-1)[0], student.gather(-1, indices[..., :k]).sort(-1)[0])
    of_student.sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(student).scatter_(-1, indices[..., :k], 1.0))
    assert not of_teacher.requires_grad


CASES = [(kind, k, columns) for kind in KINDS for k in (None, 10) for columns in (64, 45, 30)]
"""The vocabulary of 64 is split at 32: whole, padded by 19, and with nothing but padding on the last rank."""


def _split(kinds_and_sizes):
    """This rank's results for each case, and the number of messages."""
    from unittest.mock import patch

    import torch.distributed as dist

    results = []
    for kind, k, columns in kinds_and_sizes:
        student, teacher, weights = draw(5, 2, 64)
        part = 64 // dist.get_world_size()
        own = student.detach()[..., part * dist.get_rank() :][..., :part].clone().requires_grad_()
        options = {"vocab_size": columns, "group": dist.group.WORLD}
        # several blocks of rows, none of which may be left from the pass before
        with patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers, patch.dict(module._BLOCK, cpu=(3 * part, 3 * part)):
            inputs = own, teacher[..., part * dist.get_rank() :][..., :part].clone()
            if k is None:
                losses = divergence(*inputs, kind=kind, temperature=1.5, overwrite_teacher=True, **options)
            else:
                losses = divergence(*largest_logits(*inputs, k, **options), kind=kind, temperature=1.5)
            (losses * weights).sum().backward()
        results.append((losses.detach(), own.grad, gathers.call_count))
    return results


@pytest.mark.ranks
def test_a_split_vocabulary_gives_the_same(ranks):
    split = ranks(2).run(_split, CASES)
    for (kind, k, columns), (losses, gradient, messages), (others, rest, _) in zip(CASES, *split, strict=True):
        student, teacher, weights = draw(5, 2, 64)
        kept = torch.arange(columns).expand(5, 2, columns) if k is None else teacher[..., :columns].topk(k, -1)[1]
        theirs = student.detach().clone().requires_grad_()
        expected = dense(theirs.gather(-1, kept), teacher.gather(-1, kept), kind, 1.5)
        (expected * weights).sum().backward()
        assert torch.equal(losses, others)
        assert worst(losses, expected.detach()) < TOL_LOSS
        assert worst(torch.cat([gradient, rest], -1), theirs.grad.double()) < TOL_GRADIENT[torch.float32]
        assert messages == 1
