"""What runs at once: within ranks, memory and GPUs; all end when the caller does."""

import threading
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest

from nemo_opt.testing.suite.machine import Machine
from nemo_opt.testing.suite.schedule import _Running, run_all
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome, Status


def script(name, ranks, **settings):
    return Script(path=Path(f"{name}.sh"), tier="L2", ranks=ranks, timeout_s=1, device="any", needs=(), owner="@x", **settings)


def machine(**settings):
    return Machine(**{"device": "", "cores": 2, "gpus": (), "memory_gib": 64.0} | settings)


def passed(one):
    return Outcome(script=one, status=Status.PASS)


def at_once(scripts, there, jobs=None):
    """Names of the scripts that start before any has ended, and the GPUs they hold."""
    running = _Running(there, jobs)
    for one in scripts:
        if running.fits(one):
            running.start(one, lambda *_: Future())
    return {one.name: running.gpus[future] for future, one in running.scripts.items()}


@pytest.mark.parametrize(
    ("ranks", "settings", "jobs", "started"),
    [
        ([2, 2, 2], {}, None, [0]),
        ([1, 1, 1, 1], {}, None, [0, 1]),
        ([4, 4, 1], {}, None, [0]),
        ([1, 2, 1], {}, None, [0, 2]),
        ([1, 1, 1], {}, 1, [0]),
        ([2, 2, 2], {}, 2, [0, 1]),
        ([1, 1, 1], {"memory_gib": 1.5}, None, [0]),
        ([2, 2, 2], {"memory_gib": 4.0}, 3, [0, 1]),
        ([9], {"memory_gib": 1.0}, None, [0]),
        ([1, 1, 1], {"gpus": ("0", "1")}, 3, [0, 1]),
        ([2, 1, 1], {"gpus": ("0", "1", "2")}, None, [0, 1]),
    ],
)
def test_as_many_as_fit_and_at_least_one(ranks, settings, jobs, started):
    scripts = [script(str(number), count) for number, count in enumerate(ranks)]
    assert list(at_once(scripts, machine(**settings), jobs)) == [str(number) for number in started]


def test_memory_of_the_header_counts():
    scripts = [script("A", 1, memory_gib=6.0), script("B", 1, memory_gib=3.0), script("C", 1, memory_gib=2.0)]
    assert list(at_once(scripts, machine(memory_gib=8.0, cores=8))) == ["A", "C"]


def test_no_two_scripts_share_a_gpu():
    scripts = [script("A", 2), script("B", 1), script("C", 1)]
    assert at_once(scripts, machine(gpus=("4", "5", "6"))) == {"A": ("4", "5"), "B": ("6",)}
    assert at_once(scripts, machine(gpus=("4", "5", "6")), jobs=1) == {"A": ()}, "alone it sees all"


def test_each_runs_once_and_two_at_a_time():
    meet, order = threading.Barrier(2, timeout=20), []

    def run(one, gpus, stop):
        order.append(one.name)
        meet.wait()
        return passed(one)

    scripts = [script(name, 1) for name in "ABCD"]
    assert sorted(outcome.name for outcome in run_all(scripts, machine(), run)) == ["A", "B", "C", "D"]
    assert sorted(order[:2]) == ["A", "B"]
    assert sorted(order) == ["A", "B", "C", "D"]


class Interrupted(BaseException):
    pass


def test_an_interruption_ends_what_runs():
    ended = []

    def run(one, gpus, stop):
        if one.name == "L2_A":
            return passed(one)
        assert stop.wait(10)
        ended.append(one.name)
        return passed(one)

    def interrupted():
        with closing(run_all([script("L2_A", 1), script("L2_B", 1), script("L2_C", 2)], machine(), run)) as outcomes:
            for _ in outcomes:
                raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert ended == ["L2_B"], "and nothing else starts"


def test_an_error_of_the_runner_is_not_lost():
    def run(one, gpus, stop):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_all([script("L2_A", 1)], machine(), run))
