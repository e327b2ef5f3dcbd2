"""What is repaired in Megatron-Core's optimizers, on stand-ins; real ones resume in test_load.py."""

from types import SimpleNamespace

import nemo_opt._stack

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_opt.checkpoint.optimizer import load_optimizer


@pytest.fixture
def distributed():
    """A distributed optimizer without parameters, that notes what it is told to set."""
    optimizer = object.__new__(DistributedOptimizer)
    optimizer.optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)])
    optimizer.init_state_fn = None
    optimizer.told = []
    optimizer._set_main_param_and_optimizer_states = lambda parameter, tensors: optimizer.told.append((parameter, tensors))
    return optimizer


def test_a_distributed_optimizer_looks_for_no_count(distributed):
    chain = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(optimizer=None), distributed],
        load_state_dict=lambda loaded: distributed._set_main_param_and_optimizer_states("weight", loaded),
    )
    load_optimizer(chain, {"exp_avg": 1.0})
    assert distributed.told == [("weight", {"step": None, "exp_avg": 1.0})]
    distributed._set_main_param_and_optimizer_states("weight", {})
    assert distributed.told[-1] == ("weight", {}), "the patch ends with the loading"


def test_parameters_that_shared_a_count_have_their_own(distributed):
    count = torch.tensor(3.0)
    for parameter in distributed.optimizer.param_groups[0]["params"]:
        distributed.optimizer.state[parameter]["step"] = count
    distributed.load_state_dict = lambda loaded: None
    load_optimizer(distributed, {})
    counts = [state["step"] for state in distributed.optimizer.state.values()]
    counts[0] += 1
    assert [float(value) for value in counts] == [4.0, 3.0]
    assert float(count) == 3.0
