from types import SimpleNamespace

import nemo_opt._stack

import pytest
import torch

from nemo_opt.training.optimizer import finite_gradients


def chunk(*gradients, experts=()):
    """Stands for a wrapped model: its gradient buffers."""
    dense, expert = ([SimpleNamespace(grad_data=torch.tensor(values)) for values in of_kind] for of_kind in (gradients, experts))
    return SimpleNamespace(buffers=dense, expert_parallel_buffers=expert)


LARGEST = torch.finfo(torch.float32).max


def test_finite_gradients_pass():
    """The largest numbers too, whose sum overflows, and buffers without a parameter."""
    assert finite_gradients([chunk([LARGEST, LARGEST, -LARGEST], []), chunk([0.0], experts=[[1.0]])])
    assert finite_gradients([chunk()])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_one_that_is_not_is_found_wherever_it_is(wrong):
    assert not finite_gradients([chunk([wrong, 1.0])])
    assert not finite_gradients([chunk([1.0, 2.0], [1.0, wrong])])
    assert not finite_gradients([chunk([1.0]), chunk([1.0], experts=[[2.0, wrong]])])
