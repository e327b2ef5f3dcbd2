import io
import random

import nemo_opt._stack

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_opt.checkpoint.rng import random_states, restore_random_states
from nemo_opt.parallel import Topology, parallel


@pytest.fixture(autouse=True)
def layout():
    with parallel(Topology(), seed=5):
        yield


def draw():
    """A number from each source."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), tracked]


def test_every_source_continues_where_it_was():
    random.gauss(0, 1)  # keeps its second number for later
    np.random.randn()
    states = random_states()
    expected = draw()
    assert draw() != expected
    restore_random_states(states)
    assert draw() == expected


def test_states_are_loadable_without_running_code():
    buffer = io.BytesIO()
    torch.save(random_states(), buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    expected = draw()
    restore_random_states(states)
    assert draw() == expected
