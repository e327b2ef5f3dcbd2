import pytest

from nemo_opt.checkpoint.collective import on_each, on_first, rank, world_size
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
