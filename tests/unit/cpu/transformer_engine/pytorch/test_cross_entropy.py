"""Cross entropy against torch, whole and with the vocabulary on two ranks."""

import pytest
import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
from nemo_opt.errors import ConfigError

TARGET = torch.tensor([[0, 9, 4], [5, -100, 2]])


def _logits():
    return (10 * torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()


def _expected(smoothing):
    logits = _logits()
    loss = functional.cross_entropy(logits.flatten(0, 1), TARGET.flatten(), reduction="none", label_smoothing=smoothing).reshape(2, 3)
    return loss, torch.autograd.grad((loss * _weights()).sum(), logits)[0]


def _weights():
    return torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch(smoothing):
    logits = _logits()
    loss = parallel_cross_entropy(logits, TARGET, smoothing)
    expected, expected_grad = _expected(smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad((loss * _weights()).sum(), logits)[0], expected_grad)


def test_bfloat16_gives_a_float32_loss():
    assert parallel_cross_entropy(_logits().bfloat16(), TARGET).dtype == torch.float32
    with pytest.raises(ConfigError, match="reduce_loss"):
        parallel_cross_entropy(_logits(), TARGET, reduce_loss=True)


def _cut(smoothing):
    import torch.distributed as dist

    logits = _logits().detach().chunk(2, dim=-1)[dist.get_rank()].contiguous().requires_grad_()
    loss = parallel_cross_entropy(logits, TARGET, smoothing, False, dist.group.WORLD)
    return loss.detach(), torch.autograd.grad((loss * _weights()).sum(), logits)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_ranks_equal_one(ranks, smoothing):
    expected, expected_grad = _expected(smoothing)
    (loss0, grad0), (loss1, grad1) = ranks(2).run(_cut, smoothing)
    torch.testing.assert_close(loss0, expected.detach())
    torch.testing.assert_close(loss1, expected.detach())
    torch.testing.assert_close(torch.cat([grad0, grad1], -1), expected_grad)
