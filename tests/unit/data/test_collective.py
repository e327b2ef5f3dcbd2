import time

import nemo_opt._stack

import pytest
import torch.distributed as dist

from nemo_opt.data._collective import on_rank_zero
from nemo_opt.errors import DataError


def works():
    calls = []

    def work():
        calls.append(dist.get_rank())
        return {"rank": dist.get_rank()}

    return on_rank_zero(work), calls


def works_slowly():
    from nemo_opt.data import _collective

    _collective._HEARTBEAT_S = 0.02
    sent = []
    broadcast = dist.broadcast_object_list
    dist.broadcast_object_list = lambda box, src: (broadcast(box, src=src), sent.append(box[0]))[0]
    try:
        result = on_rank_zero(lambda: time.sleep(0.3) or "done")
    finally:
        dist.broadcast_object_list = broadcast
        _collective._HEARTBEAT_S = 5.0
    return result, sent


def fails(error):
    def work():
        raise error

    try:
        on_rank_zero(work)
    except (DataError, KeyError) as raised:
        return type(raised).__name__, str(raised)
    return None


def test_one_process_just_works():
    assert on_rank_zero(lambda: 3) == 3
    with pytest.raises(DataError, match="empty"):
        on_rank_zero(lambda: (_ for _ in ()).throw(DataError("empty")))


@pytest.mark.ranks
def test_rank_zero_works_for_all(ranks):
    assert ranks(2).run(works) == [({"rank": 0}, [0]), ({"rank": 0}, [])]


@pytest.mark.ranks
def test_no_wait_is_longer_than_a_heartbeat(ranks):
    """Tokenising may take longer than any timeout of a process group."""
    (one, sent), (two, heard) = ranks(2).run(works_slowly)
    assert one == two == "done"
    assert sent == heard
    assert sent[-1] == ("done", None)
    assert len(sent) > 3


@pytest.mark.ranks
def test_errors_reach_every_rank(ranks):
    assert ranks(2).run(fails, DataError("x.txt is empty")) == [("DataError", "x.txt is empty")] * 2
    assert ranks(2).run(fails, KeyError("y")) == [("KeyError", "'y'"), ("DataError", "rank 0 failed: KeyError('y')")]
