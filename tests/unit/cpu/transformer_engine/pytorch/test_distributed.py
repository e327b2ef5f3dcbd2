"""Named random states, and recomputation."""

import pytest
import torch

from nemo_opt.cpu.transformer_engine.pytorch import distributed
from nemo_opt.errors import ConfigError


def test_each_name_draws_its_own_sequence():
    tracker = distributed.CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(2)
    with tracker.fork("b"):
        other = torch.rand(2)
    with tracker.fork("a"):
        second = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), outside)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([first, second]), expected)
    assert not torch.equal(first, other)


def test_states_travel():
    tracker = distributed.CudaRNGStatesTracker()
    tracker.add("a", 1)
    states = tracker.get_states()
    with tracker.fork("a"):
        first = torch.rand(1)
    tracker.set_states(states)
    assert distributed.get_all_rng_states().keys() == {"a"}
    with tracker.fork("a"):
        assert torch.equal(torch.rand(1), first)


def test_names_and_seeds_are_used_once():
    tracker = distributed.CudaRNGStatesTracker()
    tracker.add("a", 1)
    for name, seed in (("a", 2), ("b", 1)):
        with pytest.raises(ConfigError, match=name):
            tracker.add(name, seed)
    with pytest.raises(ConfigError, match="was not added"), tracker.fork("c"):
        pass
    tracker.reset()
    tracker.add("a", 1)
    assert not distributed.graph_safe_rng_available()


def _block(x, weight, scale=1.0):
    return torch.nn.functional.dropout(torch.tanh(x @ weight) * scale, 0.5)


def test_recomputation_sees_the_same_random_numbers():
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    torch.manual_seed(0)
    plain = _block(x, weight, scale=2.0)
    grads = torch.autograd.grad(plain.sum(), (x, weight))
    torch.manual_seed(0)
    out = distributed.checkpoint(_block, x, weight, scale=2.0)
    after = torch.get_rng_state()
    torch.rand(7)
    out.sum().backward()
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close((x.grad, weight.grad), grads)
    torch.manual_seed(0)
    _block(x, weight)
    assert torch.equal(torch.get_rng_state(), after)


def test_recomputation_restores_the_trackers_states():
    tracker = distributed.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 1)
    drawn = []

    def run(x, flag):
        with tracker.fork():
            noise = torch.rand(3)
        drawn.append(noise)
        return x * noise, flag

    x = torch.ones(3, requires_grad=True)
    out, flag = distributed.checkpoint(run, x, "text", get_rng_state_tracker=lambda: tracker)
    with tracker.fork():
        later = torch.get_rng_state()
    out.sum().backward()
    assert flag == "text"
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(x.grad, drawn[0])
    with tracker.fork():
        assert torch.equal(torch.get_rng_state(), later)


def test_refusals_and_answers():
    with pytest.raises(ConfigError, match="distribute_saved_activations"):
        distributed.checkpoint(_block, torch.zeros(1, 1), torch.zeros(1, 1), distribute_saved_activations=True)
    with pytest.raises(ConfigError, match="quantizer"):
        distributed.gather_along_first_dim(torch.zeros(1), None, quantizer=object())
    with distributed.activation_recompute_forward(activation_recompute=True):
        assert not distributed.is_fp8_activation_recompute_enabled()
    assert not distributed.in_fp8_activation_recompute_phase()


def _along_first_dim():
    import torch.distributed as dist

    rank, group = dist.get_rank(), dist.group.WORLD
    gathered, handle = distributed.gather_along_first_dim(torch.full((1, 2), float(rank)), group)
    scattered, _ = distributed.reduce_scatter_along_first_dim(torch.arange(4.0) + rank, group)
    assert handle is None
    return gathered.tolist(), scattered.tolist()


@pytest.mark.ranks
def test_along_first_dim(ranks):
    first, second = ranks(2).run(_along_first_dim)
    assert first == ([[0.0, 0.0], [1.0, 1.0]], [1.0, 3.0])
    assert second == ([[0.0, 0.0], [1.0, 1.0]], [5.0, 7.0])
