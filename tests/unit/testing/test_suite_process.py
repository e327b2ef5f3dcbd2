"""The process of a script: its time limit, its one log, and nothing left of it, however stubborn."""

import os
import threading
import time
from pathlib import Path

import pytest

from nemo_opt.testing.suite import process as module
from nemo_opt.testing.suite.process import run_process


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GRACE_S", 0.3)

    def run(body, limit_s=20.0, stop=None):
        script = tmp_path / "script.sh"
        script.write_text(body)
        environment = os.environ | {"PIDS": str(tmp_path / "pids")}
        return run_process(script, tmp_path / "log", environment, limit_s, stop or threading.Event())

    return run


def assert_gone(tmp_path, count):
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == count
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_code_time_and_one_log(run, tmp_path):
    ended = run("echo fine; echo more >&2; cat; exit 3")
    assert ended.code == 3
    assert 0 < ended.time_s < 10
    assert (tmp_path / "log").read_text() == "fine\nmore\n"
    assert run("kill -SEGV $$").code == -11


def test_a_hung_script_is_ended_at_its_limit(run, tmp_path):
    ended = run("sleep 60 & echo $$ $! >>$PIDS; wait", limit_s=0.8)
    assert ended.code is None
    assert 0.8 <= ended.time_s < 5
    assert_gone(tmp_path, 2)


def test_nothing_stubborn_is_left(run, tmp_path):
    """A step that ignores SIGTERM in a process group of its own, a script that does so, and one that is stopped."""
    ended = run(
        """
        trap '' TERM
        set -m
        bash -c 'trap "" TERM; echo $$ >>$PIDS; while true; do sleep 0.05; done' &
        set +m
        echo $$ >>$PIDS
        kill -STOP $$
        """,
        limit_s=0.8,
    )
    assert ended.code is None
    assert_gone(tmp_path, 2)


def test_what_a_script_left_behind_is_ended_with_it(run, tmp_path):
    start = time.monotonic()
    assert run("sleep 60 & echo $! >>$PIDS; (set -m; sleep 60 & echo $! >>$PIDS); exit 0").code == 0
    assert time.monotonic() - start < 5
    assert_gone(tmp_path, 2)


def test_stop_ends_it(run, tmp_path):
    stop = threading.Event()

    def stop_it():
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        stop.set()

    threading.Thread(target=stop_it, daemon=True).start()
    ended = run("echo $$ >>$PIDS; sleep 60", stop=stop)
    assert ended.code is None
    assert ended.time_s < 15, "long before its limit"
    assert_gone(tmp_path, 1)
