"""Older runs: what is usual, which may inform a run and never break it."""

import json
from dataclasses import replace

import pytest

from nemo_opt.testing.suite import history as module
from nemo_opt.testing.suite.history import History, Past, Run, default_place

RUN = Run(started="2030-01-01T00:00:00+00:00", commit="abc", device="cpu", fresh=False, jobs=None, time_s=3.0, exit_code=0)


def past(time_s, status="pass", asserted=3):
    return Past(status=status, time_s=time_s, asserted=asserted)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "deep" / "history.jsonl"


def test_round_trip(place):
    assert History(place).runs == []
    run = replace(RUN, scripts={"L2_A": past(2.0)})
    History(place).add(run)
    History(place).add(RUN)
    assert History(place).runs == [run, RUN]
    assert run.counted("pass") == 1


def test_usual_is_the_median_of_the_last_passes():
    assert History.usual_s([]) is None
    assert History.usual_s([past(9.0, "fail")]) is None
    assert History.usual_s([past(1.0), past(900.0, "timeout"), past(3.0), past(8.0)]) == 3.0
    assert History.usual_s([past(100.0)] * 20 + [past(1.0)] * 10) == 1.0


def test_only_runs_of_one_kind_are_compared(place):
    history = History(place)
    for device, fresh, time_s in (("cpu", False, 1.0), ("cpu", True, 2.0), ("cuda", False, 3.0)):
        history.add(replace(RUN, device=device, fresh=fresh, scripts={"L2_A": past(time_s)}))
    assert history.of("L2_A", device="cpu", fresh=True) == [past(2.0)]
    assert history.of("L2_B", device="cpu", fresh=True) == []


@pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"started": "x"}', '{"scripts": []}', '{"scripts": {"L2_A": {}}}'])
def test_a_damaged_line_is_left_out(place, line):
    History(place).add(RUN)
    with place.open("a") as file:
        file.write(line + "\n")
    with place.open("ab") as file:
        file.write(b"\xff\xfe\n" + json.dumps({"started": "cut"})[:9].encode())
    History(place).add(RUN)
    assert History(place).runs == [RUN, RUN]


def test_it_does_not_grow_for_ever(place, monkeypatch):
    monkeypatch.setattr(module, "KEPT_RUNS", 3)
    for number in range(5):
        History(place).add(replace(RUN, commit=str(number)))
    assert [json.loads(line)["commit"] for line in place.read_text().splitlines()] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("statuses", "ready"),
    [(["pass"] * 10, True), (["pass"] * 9, False), (["fail"] + ["pass"] * 10, True), (["pass"] * 10 + ["fail"] + ["pass"] * 9, False)],
)
def test_ready_to_return(place, statuses, ready):
    history = History(place)
    history.runs = [replace(RUN, scripts={"L2_A": past(1.0, status)}) for status in statuses]
    assert history.is_ready_to_return("L2_A") is ready
    assert not history.is_ready_to_return("L2_B")


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_place() == tmp_path / "nemo_opt" / "suite.jsonl"
