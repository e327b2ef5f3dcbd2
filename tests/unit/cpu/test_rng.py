"""Random states: forks are different, reproducible streams that leave no trace outside."""

import pytest
import torch

from nemo_opt import device
from nemo_opt.cpu import devices, rng

device.activate(announce=False)


@pytest.fixture(autouse=True)
def restored():
    state = torch.get_rng_state()
    yield
    rng.set_device(0)
    rng._parked.clear()
    devices.pretend(0)
    torch.set_rng_state(state)


def test_seed_and_state_govern_what_is_drawn():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    assert not torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.cuda.manual_seed_all(5)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    assert torch.cuda.initial_seed() == 5
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), first)


def test_unseeded_is_different_each_time():
    torch.cuda.seed()
    first = torch.rand(4)
    torch.cuda.seed_all()
    assert not torch.equal(torch.rand(4), first)


def test_devices_keep_their_own_streams():
    devices.pretend(2)
    torch.manual_seed(1)
    with torch.cuda.device(1):
        torch.cuda.manual_seed(7)
        expected = torch.rand(3)
        torch.cuda.manual_seed(7)
    zero = torch.rand(3)
    with torch.cuda.device(1):
        assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), zero)


def test_states_of_all_devices_are_read_and_put_back():
    devices.pretend(2)
    torch.cuda.set_rng_state(torch.Generator().manual_seed(3).get_state(), "cuda:1")
    states = torch.cuda.get_rng_state_all()
    assert len(states) == 2
    assert not torch.equal(states[0], states[1])
    torch.cuda.manual_seed_all(9)
    torch.cuda.set_rng_state_all(states)
    assert all(torch.equal(now, then) for now, then in zip(torch.cuda.get_rng_state_all(), states, strict=True))


def test_megatron_tracker_forks_real_streams(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws():
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(11)
        tracker.add("one", 21)
        tracker.add("two", 22)
        seen = {"outside": [torch.rand(2)], "one": [], "two": []}
        for name in ("one", "two", "one"):
            with tracker.fork(name):
                seen[name].append(torch.rand(2))
            seen["outside"].append(torch.rand(2))
        return {name: torch.cat(values) for name, values in seen.items()}

    first, second = draws(), draws()
    assert all(torch.equal(first[name], second[name]) for name in first)
    numbers = torch.cat(list(first.values())).tolist()
    assert len(set(numbers)) == len(numbers)
    torch.manual_seed(11)
    assert torch.equal(first["outside"], torch.rand(8))
    assert torch.equal(first["one"], torch.rand(4, generator=torch.Generator().manual_seed(21)))
    assert "CPU RNG state changed" not in caplog.text


def test_recomputation_sees_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(lambda x: torch.nn.functional.dropout(x, 0.5), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
