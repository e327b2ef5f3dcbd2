"""Layouts: names, the checks that need no torch, and starting and ending them in one process."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt import parallel
from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology

TINY = preset("tiny")
MOE = TINY.with_(num_moe_experts=4)

sizes = st.integers(1, 8)


@st.composite
def topologies(draw):
    tp, pp = draw(sizes), draw(sizes)
    sp = tp > 1 and draw(st.booleans())
    return Topology(
        tp=tp,
        pp=pp,
        vp=draw(sizes) if pp > 1 else 1,
        cp=draw(sizes),
        ep=draw(sizes) if sp or tp == 1 else 1,
        dp=draw(st.none() | st.integers(2, 8)),
        sp=sp,
        first_stage_layers=draw(st.none() | sizes) if pp > 1 else None,
        last_stage_layers=draw(st.none() | sizes) if pp > 1 else None,
    )


@given(topologies())
def test_name_and_from_name_are_inverse(topology):
    assert Topology.from_name(topology.name) == topology


@given(topologies())
def test_world_size_is_the_smallest_world_that_resolves(topology):
    if topology.dp is None or (topology.dp * topology.cp) % topology.ep == 0:
        resolved = topology.resolve(topology.world_size)
        assert resolved.model_parallel_size * resolved.dp == topology.world_size
    if topology.dp is None and topology.world_size > topology.model_parallel_size:
        with pytest.raises(ConfigError):
            topology.resolve(topology.world_size - topology.model_parallel_size)


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        (Topology(), "TP1PP1"),
        (Topology(tp=2), "TP2PP1"),
        (Topology(tp=2, sp=True), "TP2PP1SP"),
        (Topology(pp=2, vp=2), "TP1PP2VP2"),
        (Topology(cp=2, dp=2), "TP1PP1CP2DP2"),
        (Topology(pp=2, first_stage_layers=1, last_stage_layers=3), "TP1PP2LAST3FIRST1"),
    ],
)
def test_names_of_known_layouts(topology, name):
    assert Topology.from_name(topology.name) == topology
    assert Topology.from_name(name) == topology


def test_axes_may_be_left_out_of_a_name():
    assert Topology.from_name("cp2") == Topology(cp=2)
    assert Topology.from_name("PP2VP2") == Topology(pp=2, vp=2)


@pytest.mark.parametrize("name", ["", "TP", "TP2TP4", "TP2PP1X", "XTP2", "TP2 PP2", "TP0", "SPSP"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError):
        Topology.from_name(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 0}, "tp must be a positive integer, got 0"),
        ({"pp": True}, "pp must be a positive integer, got True"),
        ({"dp": -1}, "dp must be a positive integer"),
        ({"sp": True}, "tp is 1"),
        ({"vp": 2}, "pp is 1"),
        ({"first_stage_layers": 1}, "need pp > 1"),
        ({"tp": 2, "ep": 2}, "needs sp"),
    ],
)
def test_axes_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Topology(**fields)


@pytest.mark.parametrize(
    ("topology", "world_size", "message"),
    [
        (Topology(tp=2, pp=2, dp=1), 6, r"world_size 6 != tp 2 \* pp 2 \* dp 1: start 4 ranks or set dp"),
        (Topology(tp=2, pp=2), 6, r"world_size 6 is no multiple of tp 2 \* pp 2: start 8 ranks"),
        (Topology(cp=2), 3, r"tp 1 \* pp 1 \* cp 2"),
        (Topology(ep=2), 1, "dp 1 .* ep 2"),
        (Topology(), 0, "must be positive"),
    ],
)
def test_a_world_of_another_size_is_refused(topology, world_size, message):
    with pytest.raises(ConfigError, match=message):
        topology.resolve(world_size)


@pytest.mark.parametrize(
    ("topology", "model", "message"),
    [
        (Topology(tp=3), TINY, "num_attention_heads 8 % tp 3"),
        (Topology(tp=8), TINY.with_(ffn_hidden_size=12), "ffn_hidden_size 12 % tp 8"),
        (Topology(tp=6), TINY.with_(num_attention_heads=12, kv_channels=8, ffn_hidden_size=12), "padded_vocab_size 2048 % tp 6"),
        (Topology(tp=4), TINY.with_(num_attention_heads=12, num_query_groups=6, kv_channels=8), "num_query_groups 6 and tp 4"),
        (Topology(pp=3), TINY, r"num_layers 4 % \(pp 3 \* vp 1\)"),
        (Topology(pp=2, vp=4), TINY, r"num_layers 4 % \(pp 2 \* vp 4\)"),
        (Topology(pp=2, first_stage_layers=4), TINY, "leaves 0 layers for 1"),
        (Topology(pp=2, first_stage_layers=3, last_stage_layers=2), TINY, "leaves -1 layers"),
        (Topology(pp=3, first_stage_layers=1), TINY, r"num_layers 4 - 1 % \(remaining stages 2"),
        (Topology(pp=2, vp=2, first_stage_layers=1, last_stage_layers=3), TINY, r"stage layers \[1, 3\] % vp 2"),
        (Topology(ep=2), TINY, "model is dense"),
        (Topology(ep=3), MOE, "num_moe_experts 4 % ep 3"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_split_is_refused(topology, model, message):
    with pytest.raises(ConfigError, match=message):
        topology.validate(topology.world_size, model)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tp=4),
        Topology(tp=8),
        Topology(pp=4),
        Topology(pp=2, vp=2),
        Topology(pp=2, first_stage_layers=3),
        Topology(pp=3, first_stage_layers=2),
    ],
)
def test_models_that_fit_are_resolved(topology):
    assert topology.validate(2 * topology.world_size, TINY).dp == 2


def test_experts_may_be_shared_by_the_context_parallel_ranks():
    assert Topology(cp=2, ep=2).validate(2, MOE).dp == 1


def test_sequences_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match=r"seq_length 10 % \(2 \* cp 2\)"):
        Topology(cp=2).validate_sequence(10)
    with pytest.raises(ConfigError, match="sp splits"):
        Topology(tp=4, sp=True).validate_sequence(6)
    Topology(cp=2, tp=2, sp=True).validate_sequence(8)


def test_a_wrong_world_is_refused_before_torch_is_asked(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="world_size 3 is no multiple of tp 2"):
        parallel.initialize(Topology(tp=2))


def _cycle(name, times):
    """Threads after each of several starts and ends of a layout, and what an error inside leaves behind."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    threads = []
    for _ in range(times):
        with parallel.parallel(Topology.from_name(name), model=TINY) as topology:
            assert parallel.current_topology() == topology
            assert parallel_state.get_tensor_model_parallel_world_size() == topology.tp
            with pytest.raises(ConfigError, match=f"{topology.name} is still set up"):
                parallel.initialize(topology)
        assert parallel.current_topology() is None
        assert not parallel_state.model_parallel_is_initialized()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    with pytest.raises(ZeroDivisionError), parallel.parallel(Topology.from_name(name)):
        raise ZeroDivisionError
    assert parallel.current_topology() is None
    parallel.destroy()
    assert dist.is_initialized()
    return threads


@pytest.mark.ranks
def test_layouts_start_and_end_many_times_without_gathering_threads(ranks):
    for threads in ranks(2).run(_cycle, "TP2PP1", 5):
        assert max(threads) <= threads[0] + 1, "process groups are not released"


def _seeds(name):
    """A draw of the default generator and one of the tensor parallel generator."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with parallel.parallel(Topology.from_name(name), seed=5):
        common = torch.rand(1).item()
        with get_cuda_rng_tracker().fork():
            return common, torch.rand(1).item()


@pytest.mark.ranks
def test_tensor_parallel_ranks_share_one_generator_and_have_one_each(ranks):
    first, second = ranks(2).run(_seeds, "TP2PP1")
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert ranks(2).run(_seeds, "TP2PP1") == [first, second]


def _world_from_environment(folder):
    """In a process of its own: an incomplete environment is refused, a single process needs none."""
    import torch.distributed as dist

    dist.destroy_process_group()
    del os.environ["LOCAL_RANK"]
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*torchrun"):
        parallel.start_world()
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    sizes = [parallel.start_world(timeout_s=20.0) for _ in range(2)]
    with parallel.parallel(Topology()) as topology:
        assert topology.dp == 1
    dist.destroy_process_group()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sizes.append(parallel.start_world(timeout_s=20.0))
    parallel._end_world()
    assert not dist.is_initialized()
    return sizes


@pytest.mark.ranks
def test_world_comes_from_the_environment_or_is_this_process_alone(tmp_path):
    from nemo_opt.testing.ranks import RankPools

    with RankPools() as pools:
        assert pools(1).run(_world_from_environment, str(tmp_path)) == [[1, 1, 1]]
