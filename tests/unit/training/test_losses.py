"""Sums over valid tokens only."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.training.losses import language_model_loss, masked_sum


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**31))
def test_masked_sum_adds_what_the_mask_keeps(batch, seq, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(batch, seq, generator=generator)
    mask = (torch.rand(batch, seq, generator=generator) < 0.5).float()
    total, count = masked_sum(losses, mask.flatten())
    assert count == mask.sum()
    assert total == pytest.approx(losses[mask.bool()].sum().item(), rel=1e-5)


def test_a_masked_position_may_hold_anything():
    losses = torch.tensor([[1.0, math.nan]], requires_grad=True)
    total, count = masked_sum(losses, torch.tensor([[1.0, 0.0]]))
    total.backward()
    assert (total.item(), count.item()) == (1.0, 1.0)
    assert losses.grad.tolist() == [[1.0, 0.0]]


def test_language_model_loss_has_the_form_of_the_schedules():
    reduce = language_model_loss(None, {"loss_mask": torch.tensor([[1.0, 1.0, 0.0]])})
    loss, num_tokens, metrics = reduce(torch.tensor([[2.0, 4.0, 100.0]]))
    assert loss == 6.0
    assert num_tokens.dtype == torch.int
    assert num_tokens == 2
    assert metrics["loss"].tolist() == [6.0, 2.0]
