import time

import pytest
import torch.distributed as dist

from nemo_opt import collective
from nemo_opt.collective import on_each, on_first, rank, world_size
from nemo_opt.errors import CheckpointError


def fail(error):
    raise error


def test_alone_actions_simply_run():
    assert (rank(), world_size()) == (0, 1)
    assert on_first(lambda: 3) == 3
    assert on_each(lambda: 3) == [3]
    with pytest.raises(ZeroDivisionError):
        on_first(lambda: 1 // 0)


def collect():
    """What each rank sees of results and of failures elsewhere."""
    seen = [on_first(lambda: f"from {rank()}"), on_each(rank)]
    for action in (
        lambda: on_first(lambda: fail(CheckpointError("known"))),
        lambda: on_first(lambda: fail(KeyError("bug"))),
        lambda: on_each(lambda: fail(CheckpointError("on one")) if rank() == 1 else None),
    ):
        try:
            action()
        except (CheckpointError, RuntimeError) as error:
            seen.append((type(error).__name__, str(error).splitlines()[0], str(error).splitlines()[-1]))
    return seen


@pytest.mark.ranks
def test_every_rank_sees_results_and_failures(ranks):
    for seen in ranks(2).run(collect):
        assert seen[:2] == ["from 0", [0, 1]]
        assert seen[2] == ("CheckpointError", "known", "known")
        assert seen[3] == ("RuntimeError", "rank 0 failed:", "KeyError: 'bug'")
        assert seen[4] == ("CheckpointError", "on one", "on one")


def work_slowly():
    """What is sent while rank 0 works for longer than a heartbeat."""
    sent = []
    broadcast, heartbeat = dist.broadcast_object_list, collective._HEARTBEAT_S
    collective._HEARTBEAT_S = 0.02
    dist.broadcast_object_list = lambda box, src: (broadcast(box, src=src), sent.append(box[0]))[0]
    try:
        return on_first(lambda: time.sleep(0.3) or "done"), sent
    finally:
        dist.broadcast_object_list, collective._HEARTBEAT_S = broadcast, heartbeat


@pytest.mark.ranks
def test_no_wait_is_longer_than_a_heartbeat(ranks):
    """Tokenising may take longer than any timeout of a process group."""
    (one, sent), (two, heard) = ranks(2).run(work_slowly)
    assert one == two == "done"
    assert sent == heard
    assert sent[-1] == ("done", None)
    assert len(sent) > 3
