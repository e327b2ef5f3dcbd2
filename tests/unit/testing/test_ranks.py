"""The rank pool: results in order, failures that name the rank, hangs that show stacks, and a fresh pool afterwards."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_opt.testing import ranks as rank_pools
from nemo_opt.testing.ranks import RankError, RankPools, RankTimeoutError

pytestmark = pytest.mark.ranks


@dataclass(frozen=True)
class Point:
    x: int


def _identify(point, *, scale=1):
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return Point(point.x * scale + dist.get_rank()), total, os.getpid()


def _fail_on_last_rank():
    import torch
    import torch.distributed as dist

    print("about to fail")
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("lost in translation")
    dist.all_reduce(torch.ones(1))


def _die_on_rank_0():
    import torch.distributed as dist

    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_1():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        _wait_for_godot()
    dist.barrier()


def _wait_for_godot():
    time.sleep(60)


def _not_picklable():
    return lambda: None


def _initialise(name):
    from megatron.core import parallel_state

    from nemo_opt import parallel

    resolved = parallel.initialize(parallel.Topology.from_name(name))
    return resolved, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def test_results_come_back_in_order_of_ranks_and_processes_are_reused(ranks):
    first, second = (ranks(2).run(_identify, Point(3), scale=10) for _ in range(2))
    assert [r[0] for r in first] == [Point(30), Point(31)]
    assert [r[1].item() for r in first] == [3.0, 3.0]
    assert [r[2] for r in first] == [r[2] for r in second]


def test_layouts_change_from_one_dispatch_to_the_next(ranks):
    tensor, pipeline = ranks(2).run(_initialise, "TP2PP1"), ranks(2).run(_initialise, "TP1PP2")
    assert [r[1:] for r in tensor] == [(0, 0), (1, 0)]
    assert [r[1:] for r in pipeline] == [(0, 0), (0, 1)]
    assert pipeline[0][0].dp == 1


@pytest.fixture
def own_pools():
    with RankPools() as pools:
        yield pools


def test_failure_names_the_rank_and_the_next_run_gets_a_new_pool(own_pools):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 Traceback.*_fail_on_last_rank.*lost in translation.*about to fail") as caught:
        own_pools(2).run(_fail_on_last_rank)
    assert "rank 0 of 2 Traceback" not in str(caught.value)
    assert own_pools(2).run(_identify, Point(0))[1][0] == Point(1)


def test_death_is_reported_at_once(own_pools):
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 died with exit code 7"):
        own_pools(2).run(_die_on_rank_0)
    assert time.monotonic() - start < 20


def test_hang_shows_the_stack_of_every_rank(own_pools):
    pool = own_pools(2)
    with pytest.raises(RankTimeoutError, match=r"(?s)did not finish in 1 s.*--- rank 0.*barrier.*--- rank 1.*_wait_for_godot"):
        pool.run(_hang_on_rank_1, timeout_s=1.0)
    with pytest.raises(RankError, match="has failed before"):
        pool.run(_identify, Point(0))


def test_a_result_that_cannot_travel_is_an_error(own_pools):
    with pytest.raises(RankError, match=r"rank [01] of 2 .*(?s:.*)pickle"):
        own_pools(2).run(_not_picklable)


def test_local_functions_are_refused(ranks):
    with pytest.raises(TypeError, match="define it at module level"):
        ranks(2).run(lambda: None)


@pytest.mark.parametrize(("error", "word"), [(EOFError, "dead"), (TimeoutError, "stuck"), (ConnectionRefusedError, "dead")])
def test_a_fork_server_that_cannot_import_the_stack_is_reported_with_the_remedy(monkeypatch, error, word):
    class Process:
        def __init__(self, **_):
            self.exitcode = None

        def start(self):
            raise error

    monkeypatch.setattr(rank_pools, "prepare", lambda: None)
    monkeypatch.setattr(rank_pools._context, "Process", Process)
    with pytest.raises(RankError, match=f"fork server of the test ranks is {word}: `python -m nemo_opt.testing.preload`"):
        rank_pools.RankPool(2)


def _leave_a_note_at_the_end_and_fail(path):
    from multiprocessing.util import Finalize

    Finalize(None, Path(path).touch, exitpriority=1)
    raise ValueError("on purpose")


def test_a_rank_that_has_failed_ends_by_itself(own_pools, tmp_path):
    """Or coverage of all that it ran before would be lost."""
    with pytest.raises(RankError, match="on purpose"):
        own_pools(1).run(_leave_a_note_at_the_end_and_fail, str(tmp_path / "note"))
    assert (tmp_path / "note").exists()
