"""Ranks are started for real here, with targets that need no torch: the parent's own behaviour is what is tested."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_opt import _rank, launch
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.launch import RankFailedError, decode, encode, run_ranks
from nemo_opt.parallel import Topology

TARGETS = '''
import os, signal, time
from nemo_opt.errors import ConfigError

def facts(topology):
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MASTER_ADDR")
    return {"topology": topology, "torch": "torch" in __import__("sys").modules, **{n: os.environ.get(n) for n in names}}

def refuse(on):
    if os.environ.get("RANK", "0") == on:
        raise ConfigError("tp 3 does not fit")
    time.sleep(60)

def crash(on):
    if os.environ.get("RANK", "0") == on:
        raise ZeroDivisionError("a bug")
    time.sleep(60)

def die(on):
    if os.environ.get("RANK", "0") == on:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def peer(on):
    """What a lost peer looks like: the others fail of it a moment later."""
    if os.environ.get("RANK") == on:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    raise RuntimeError("connection closed by peer")

def nothing(value):
    return value

def sleep():
    open("sleeping", "w").close()
    time.sleep(60)
'''


@pytest.fixture
def targets(tmp_path, monkeypatch):
    (tmp_path / "launch_targets.py").write_text(TARGETS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", *launch.ALLOCATOR_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "launch_targets:"


def test_one_rank_is_a_child_without_elastic(targets):
    result = run_ranks(f"{targets}facts", {"topology": Topology()})
    assert result["topology"] == Topology()
    assert not result["torch"]
    assert result["RANK"] is None
    assert result["OMP_NUM_THREADS"] is None
    assert result["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


def test_users_environment_wins(targets, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert run_ranks(f"{targets}facts", {"topology": None})["MALLOC_TRIM_THRESHOLD_"] == "1"


@pytest.mark.ranks
def test_several_ranks_share_cores_and_meet_at_one_address(targets):
    result = run_ranks(f"{targets}facts", {"topology": Topology(tp=2)}, devices=2)
    assert (result["RANK"], result["WORLD_SIZE"], result["OMP_NUM_THREADS"]) == ("0", "2", "1")
    assert result["MASTER_ADDR"] == "127.0.0.1"
    assert result["topology"] == Topology(tp=2)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=[pytest.mark.ranks, pytest.mark.wide])])
def test_bad_input_in_a_rank_keeps_its_kind_and_message(targets, devices):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"^tp 3 does not fit$"):
        run_ranks(f"{targets}refuse", {"on": str(devices - 1)}, devices=devices)
    assert time.monotonic() - start < 40, "the other rank sleeps for 60 s: it must have been ended"


@pytest.mark.ranks
@pytest.mark.wide
def test_a_bug_names_its_rank_and_shows_its_traceback(targets):
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed:\nTraceback.*in crash.*ZeroDivisionError: a bug"):
        run_ranks(f"{targets}crash", {"on": "1"}, devices=2)


@pytest.mark.ranks
@pytest.mark.parametrize("target", ["peer", pytest.param("die", marks=pytest.mark.wide)])
def test_a_killed_rank_is_the_cause_not_those_that_lost_it(targets, target):
    with pytest.raises(RankFailedError, match="rank 1 was ended by SIGKILL"):
        run_ranks(f"{targets}{target}", {"on": "1"}, devices=2)


def test_killed_single_rank(targets):
    with pytest.raises(RankFailedError, match="rank 0 was ended by SIGKILL"):
        run_ranks(f"{targets}die", {"on": "0"})


def test_under_a_launcher_the_function_runs_here(targets, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    marker = object()
    assert launch.rank() == 1
    assert launch.joined()
    assert run_ranks(f"{targets}nothing", {"value": marker}, devices=2) is marker
    with pytest.raises(ConfigError, match="devices 4 != 2 ranks"):
        run_ranks(f"{targets}nothing", {"value": 1}, devices=4)


def test_impossible_number_of_ranks():
    with pytest.raises(ConfigError, match="devices 0"):
        run_ranks("x:y", {}, devices=0)


def test_ranks_die_with_a_killed_parent(targets, tmp_path):
    code = f"from nemo_opt.launch import run_ranks; run_ranks({targets + 'sleep'!r}, {{}})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "sleeping").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    parent.kill()
    parent.wait()
    while any(_alive(int(pid)) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupted_parent_ends_its_child(targets, tmp_path):
    code = f"from nemo_opt.launch import run_ranks; run_ranks({targets + 'sleep'!r}, {{}})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "sleeping").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors


class TestFailures:
    """`_raise_failure` over made-up records."""

    def fail(self, job, rank, monkeypatch, error, seconds):
        monkeypatch.setenv("RANK", str(rank))
        launch.write_failure(job, error, "Traceback: here")
        path = job / f"error-{rank}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": seconds}))

    def test_the_earliest_counts(self, tmp_path, monkeypatch):
        self.fail(tmp_path, 0, monkeypatch, RuntimeError("connection closed"), 20.5)
        self.fail(tmp_path, 1, monkeypatch, CheckpointError("weights/0.distcp is truncated"), 20.0)
        with pytest.raises(CheckpointError, match="truncated"):
            launch._raise_failure(tmp_path, {0: (1, 21.0), 1: (2, 21.0)})

    def test_ranks_ended_by_the_agent_are_no_cause(self, tmp_path, monkeypatch):
        self.fail(tmp_path, 1, monkeypatch, ConfigError("no"), 20.0)
        with pytest.raises(ConfigError):
            launch._raise_failure(tmp_path, {0: (-signal.SIGTERM, 20.0), 1: (2, 20.0)})
        with pytest.raises(ConfigError):
            launch._raise_failure(tmp_path, {0: (-signal.SIGKILL, 30.0), 1: (2, 20.0)})

    def test_without_any_record(self, tmp_path):
        with pytest.raises(RankFailedError, match=r"rank 0: exit 3"):
            launch._raise_failure(tmp_path, {0: (3, 1.0)})
        with pytest.raises(RankFailedError, match="SIGTERM"):
            launch._raise_failure(tmp_path, {0: (-signal.SIGTERM, 1.0)})

    def test_an_unknown_user_error_stays_one(self, tmp_path, monkeypatch):
        class OwnError(ConfigError):
            pass

        self.fail(tmp_path, 0, monkeypatch, OwnError("own"), 1.0)
        with pytest.raises(launch.NemoOptError, match="own"):
            launch._raise_failure(tmp_path, {0: (2, 1.0)})

    def test_no_result(self, tmp_path):
        with pytest.raises(RankFailedError, match="without a result"):
            launch.read_result(tmp_path)


class TestRank:
    """`nemo_opt._rank.main`, in this process."""

    def run(self, job, target, monkeypatch, **kwargs):
        monkeypatch.delenv("RANK", raising=False)
        (job / "job.json").write_text(json.dumps({"target": target, "kwargs": encode(kwargs)}))
        return _rank.main(job)

    def test_result(self, tmp_path, targets, monkeypatch):
        assert self.run(tmp_path, f"{targets}nothing", monkeypatch, value=[1, {"a": 2.5}]) == 0
        assert launch.read_result(tmp_path) == [1, {"a": 2.5}]

    def test_exit_codes(self, tmp_path, targets, monkeypatch):
        assert self.run(tmp_path, f"{targets}refuse", monkeypatch, on="0") == 2
        assert self.run(tmp_path, f"{targets}crash", monkeypatch, on="0") == 1
        assert "ZeroDivisionError" in json.loads((tmp_path / "error-0.json").read_text())["traceback"]

    def test_interrupt(self, tmp_path, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(launch, "resolve", lambda _: interrupt)
        assert self.run(tmp_path, "x:y", monkeypatch) == 130


class TestCodec:
    def test_round_trip(self):
        values = {"topology": Topology(pp=2), "path": Path("/x"), "list": (1, None, "a", 2.5, True), "nested": {"t": Topology()}}
        expected = {"topology": Topology(pp=2), "path": "/x", "list": [1, None, "a", 2.5, True], "nested": {"t": Topology()}}
        assert decode(json.loads(json.dumps(encode(values)))) == expected

    def test_other_objects_are_refused(self):
        with pytest.raises(TypeError, match="object"):
            encode({"x": object()})

    @pytest.mark.parametrize("kind", ["subprocess:Popen", "os:system", "nemo_opt.launch:run_ranks", "nemo_opt.launch:RankFailedError"])
    def test_only_this_packages_dataclasses_are_built(self, kind):
        with pytest.raises(TypeError, match="not one of nemo_opt's dataclasses"):
            decode({"__dataclass__": kind, "args": ["true"]})
