"""tests/functional/lib.sh: steps with limits, assertions that are recorded, exit codes that say whose fault it is."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIB = ROOT / "tests" / "functional" / "lib.sh"


class Script:
    """Runs a script that sources the real lib.sh."""

    def __init__(self, tmp_path):
        self.folder, self.record, self.metrics = tmp_path, tmp_path / "assertions.jsonl", tmp_path / "metrics"

    def __call__(self, body, **environment):
        script = self.folder / "L2_Try.sh"
        script.write_text(f"source {LIB}\n{body}\n")
        named = {"PYTHON": sys.executable, "NEMO_OPT_ASSERTIONS": str(self.record), "NEMO_OPT_METRICS": str(self.metrics)}
        return subprocess.run(["bash", str(script)], env=os.environ | named | environment, capture_output=True, text=True, timeout=60)

    def recorded(self):
        """(kind, what, holds) of each assertion; they are gone afterwards."""
        lines = [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [(line["kind"], line["what"], line["holds"]) for line in lines]


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.parametrize("body", ["false", "step first 20 false", "check missing.json 'x == 1'", "$(false)", "false | cat"])
def test_a_first_command_that_fails_ends_the_script(script, body):
    """Of 252 scripts of NeMo one has `set -e`: the others end as their last command does."""
    done = script(f"{body}\necho not reached")
    assert done.returncode != 0
    assert "not reached" not in done.stdout
    assert f"L2_Try: FAILED (exit code {done.returncode})" in done.stdout


def test_steps(script):
    done = script("step one 20 true; step two 20 bash -c 'exit 3'; echo not reached")
    assert done.returncode == 3
    assert "--- one: exit code 0" in done.stdout
    assert "not reached" not in done.stdout


def test_a_step_whose_process_is_killed_fails(script):
    assert script("step one 20 bash -c 'kill -KILL $$'").returncode == 137


@pytest.mark.parametrize(("limit", "scale"), [("0.3", "1"), ("3", "0.1")])
def test_a_step_out_of_time_is_told_apart_and_ended(script, tmp_path, limit, scale):
    done = script(f"step slow {limit} bash -c 'sleep 60 & echo $! > {tmp_path}/pid; wait'", NEMO_OPT_TIMEOUT_SCALE=scale)
    assert done.returncode == 124
    assert "L2_Try: TIMEOUT" in done.stdout
    assert "longer than 0.3 s" in done.stderr
    child, deadline = Path("/proc") / (tmp_path / "pid").read_text().strip(), time.monotonic() + 10
    while child.exists():
        assert time.monotonic() < deadline, "what the step started is still there"
        time.sleep(0.02)


def test_output_directory(script, tmp_path):
    done = script('touch "$OUT/x"; echo "$OUT"')
    assert done.returncode == 0
    assert not Path(done.stdout.splitlines()[0]).exists()
    kept = tmp_path / "kept"
    assert script('touch "$OUT/x"', OUT=str(kept)).returncode == 0
    assert (kept / "x").exists()
    done = script("true", OUT=str(kept))
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_checks_are_recorded(script, tmp_path):
    (tmp_path / "r.json").write_text('{"loss": 5.0}')
    assert script(f"check {tmp_path}/r.json 'loss == 5' 'loss > 0'").returncode == 0
    assert script.recorded() == [("check", "loss == 5", True), ("check", "loss > 0", True)]
    assert script(f"check {tmp_path}/r.json 'loss == 4' || true").returncode == 0
    assert script.recorded() == [("check", "loss == 4", False)], "a failure that is swallowed is still known"
    assert script(f"check {tmp_path}/r.json 'loss == 5'", NEMO_OPT_ASSERTIONS="").returncode == 0


def test_refusals_are_recorded(script):
    fail = "bash -c 'echo it is wrong; exit 2'"
    for arguments, holds in ((f"2 'is wrong' {fail}", True), (f"1 'is wrong' {fail}", False), (f"2 'other' {fail}", False)):
        assert script(f"refused {arguments}").returncode == (0 if holds else 1)
        assert script.recorded() == [("refused", arguments.split("'")[1], holds)]
    assert script("refused 0 '' true; refused 2 '' true").returncode == 1


def test_commands_do_not_record_unless_they_assert(script):
    """A script may run unit tests, which check on purpose what does not hold."""
    record = '"$PYTHON" -m nemo_opt.testing.assertions golden "losses are the same" true'
    assert script(record).returncode == 0
    assert script.recorded() == []
    assert script(f"step compare 20 asserting {record}").returncode == 0
    assert script.recorded() == [("golden", "losses are the same", True)]


@pytest.mark.parametrize(
    ("body", "code"), [("fixtures", 75), ("exit 75", 75), ("exit 3", 3)], ids=["no fixtures", "infrastructure", "failure"]
)
def test_whose_fault_it_is(script, tmp_path, body, code):
    (tmp_path / "file").touch()
    done = script(body, NEMO_OPT_FIXTURES=str(tmp_path / "file" / "below"))
    assert done.returncode == code
    assert ("INFRASTRUCTURE" in done.stdout) == (code == 75)


@pytest.mark.parametrize(("free", "before", "after"), [(100, 1, 75), (100, 0, 0), (20000, 1, 1), ("-", 1, 1)])
def test_a_full_disk_is_told_apart(script, tmp_path, free, before, after):
    (tmp_path / "df").write_text(f"#!/bin/bash\necho header\necho disk 1 1 {free} 99 /\n")
    (tmp_path / "df").chmod(0o755)
    done = script(f"exit {before}", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == after
    assert ("the disk is full" in done.stdout) == (after == 75)


def test_metrics_are_kept(script):
    assert script('mkdir -p "$OUT/a/b"; echo 1 >"$OUT/a/b/metrics.jsonl"; echo 2 >"$OUT/metrics.jsonl"; exit 3').returncode == 3
    assert {path.name: path.read_text() for path in script.metrics.iterdir()} == {"a_b_metrics.jsonl": "1\n", "metrics.jsonl": "2\n"}


@pytest.mark.parametrize("step", ["step out 0.3", "step done 20"])
def test_what_ignores_sigterm_does_not_outlive_its_step(script, tmp_path, step):
    """Neither of a step that ran out of its time, nor of one that ended and left it behind."""
    pid = tmp_path / "pid"
    stubborn = f"(trap '' TERM; echo $BASHPID >{pid}; while true; do sleep 0.05; done) & until [ -s {pid} ]; do sleep 0.02; done"
    waits = "; sleep 30" if "out" in step else ""
    done = script(f"GRACE_S=1\n{step} bash -c {shlex.quote(stubborn + waits)}")
    assert done.returncode == (124 if waits else 0), done.stderr
    assert is_dead(pid.read_text().strip())


def is_dead(pid):
    """Gone, or waiting for a parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_whom_a_script_ends_is_marked_where_coverage_is_measured(script, tmp_path):
    """It leaves no data, which would count as lost; what ended by itself is not marked."""
    left = f"bash -c 'sleep 60 & echo $! > {tmp_path}/pid; sleep 0.1 & wait $!'"
    marks = tmp_path / "marks"
    marks.mkdir()
    assert script(f"step leaves 20 {left}; step leaves_nothing 20 true", NEMO_OPT_COVERAGE_MARKS=str(marks)).returncode == 0
    pid = int((tmp_path / "pid").read_text())
    assert [json.loads(mark.read_text()) for mark in marks.glob("ended.*.json")] == [{"host": socket.gethostname(), "pid": pid}]
