"""The suite runner, over small scripts: each way to end is told apart, and nothing that did not run passes."""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.forked import SOCKET_ENV
from nemo_opt.testing import suite

ROOT = Path(__file__).parents[3]
HEADER = "# tier={tier} ranks=2 timeout={timeout} device={device} needs={needs} owner=@x\n"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "functional"
    path.mkdir()
    return path


def write(folder, name, body, *, timeout=30, device="any", needs="none"):
    path = folder / f"{name}.sh"
    path.write_text("#!/usr/bin/env bash\n" + HEADER.format(tier=name[:2], timeout=timeout, device=device, needs=needs) + body + "\n")
    return path


def run(folder, tmp_path, **options):
    report = tmp_path / "report.json"
    code = suite.main(folder=folder, logs=tmp_path / "logs", json_path=report, **({"fresh": True} | options))
    return code, {s["name"]: s for s in json.loads(report.read_text())["scripts"]}


def test_ways_to_end(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    write(folder, "L2_Good", "echo fine; echo more >&2")
    write(folder, "L2_Bad", "echo the reason; exit 3")
    write(folder, "L2_Slow", "sleep 60 & echo $! > $PID_FILE; wait", timeout=1)
    write(folder, "L2_Step", "exit 124")
    write(folder, "L2_Killed", "kill -KILL $$")
    write(folder, "L2_Gpu", "exit 0", device="cuda")
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    code, ended = run(folder, tmp_path)
    assert code == 1
    assert {name: s["status"] for name, s in ended.items()} == {
        "L2_Good": "pass",
        "L2_Bad": "fail",
        "L2_Slow": "timeout",
        "L2_Step": "timeout",
        "L2_Killed": "fail",
        "L2_Gpu": "not run",
    }
    assert ended["L2_Killed"]["reason"] == "ended by SIGKILL"
    assert ended["L2_Gpu"]["log"] is None
    assert Path(ended["L2_Good"]["log"]).read_text() == "fine\nmore\n"
    output = capsys.readouterr().out
    assert "the reason" in output, "the end of a failing log is shown"
    assert "1 pass, 2 fail, 2 timeout, 1 not run" in output
    assert_gone(int((tmp_path / "pid").read_text()))


def assert_gone(pid):
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "a child of a script that ran out of time is still there"
        time.sleep(0.02)


def test_good_scripts(folder, tmp_path):
    write(folder, "L2_A", "exit 0")
    write(folder, "L0_B", 'test -x "$PYTHON"')
    assert run(folder, tmp_path)[0] == 0
    code, ended = run(folder, tmp_path, tier="L0")
    assert (code, list(ended)) == (0, ["L0_B"])
    assert list(run(folder, tmp_path, only=["_A"])[1]) == ["L2_A"]


def test_only_not_run_is_no_success(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    write(folder, "L2_Gpu", "exit 0", device="cuda")
    assert run(folder, tmp_path)[0] == 1


def test_nothing_selected(folder, tmp_path):
    with pytest.raises(ConfigError, match="holds no functional script"):
        suite.main(folder=folder, logs=tmp_path)
    write(folder, "L2_A", "exit 0")
    with pytest.raises(ConfigError, match="no script selected"):
        suite.main(folder=folder, logs=tmp_path, only=["Nothing"])


def test_scripts_without_fixtures_do_not_run(folder, tmp_path, monkeypatch):
    from nemo_opt.testing import fixtures

    calls = []

    def build():
        calls.append(1)
        raise ConfigError("no disk")

    monkeypatch.setattr(fixtures, "build", build)
    write(folder, "L2_A", "exit 0", needs="fixtures")
    write(folder, "L2_B", "exit 0", needs="fixtures")
    write(folder, "L2_C", "exit 0")
    code, ended = run(folder, tmp_path)
    assert (code, len(calls)) == (0, 1)
    assert [ended[f"L2_{n}"]["status"] for n in "ABC"] == ["not run", "not run", "pass"]
    assert ended["L2_A"]["reason"] == "no fixtures: no disk"


def test_fixtures_are_made_first(folder, tmp_path, monkeypatch):
    from nemo_opt.testing import fixtures

    monkeypatch.setattr(fixtures, "build", lambda: (tmp_path / "made").touch())
    write(folder, "L2_A", f"test -e {tmp_path}/made", needs="fixtures")
    assert run(folder, tmp_path)[0] == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "any"])
def test_devices(folder, device, monkeypatch):
    script = suite.discover(write(folder, "L2_A", "", device=device).parent)[0]
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    assert bool(suite._absent_device(script)) == (device == "cuda")
    monkeypatch.delenv("NEMO_OPT_DEVICE")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert bool(suite._absent_device(script)) == (device == "cpu")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("# nothing", "needs one header line"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none", "lacks owner"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none owner=@x colour=red", "unknown keys"),
        ("# tier=L1 ranks=2 timeout=5 device=any needs=none owner=@x", "does not agree"),
        ("# tier=L2 ranks=2 timeout=5 device=tpu needs=none owner=@x", "device 'tpu'"),
        ("# tier=L2 ranks=2 timeout=soon device=any needs=none owner=@x", "timeout 'soon'"),
        ("# tier=L2 ranks=0 timeout=5 device=any needs=none owner=@x", "ranks '0'"),
        ("# tier=L2 ranks=1 timeout=5 device=any needs=models owner=@x", "needs \\['models'\\]"),
    ],
)
def test_bad_headers(folder, header, message):
    (folder / "L2_A.sh").write_text(header + "\n")
    with pytest.raises(ConfigError, match=message):
        suite.discover(folder)


def test_scripts_of_the_repository_have_headers_and_are_executable():
    scripts = suite.discover(ROOT / "tests" / "functional")
    assert len(scripts) >= 6
    for script in scripts:
        assert os.access(script.path, os.X_OK), script.path
        assert "lib.sh" in script.path.read_text()


class TestLib:
    """tests/functional/lib.sh."""

    def lib(self, tmp_path, body, **environment):
        script = tmp_path / "L2_Try.sh"
        script.write_text(f"source {ROOT}/tests/functional/lib.sh\n{body}\n")
        import subprocess
        import sys

        return subprocess.run(
            ["bash", str(script)], env=os.environ | {"PYTHON": sys.executable} | environment, capture_output=True, text=True, timeout=60
        )

    def test_steps(self, tmp_path):
        done = self.lib(tmp_path, "step one 20 true; step two 20 bash -c 'exit 3'; echo not reached")
        assert done.returncode == 3
        assert "not reached" not in done.stdout
        assert "L2_Try: FAILED (exit code 3)" in done.stdout

    def test_a_step_out_of_time_is_told_apart_and_ended(self, tmp_path):
        done = self.lib(tmp_path, f"step slow 0.3 bash -c 'sleep 60 & echo $! > {tmp_path}/pid; wait'")
        assert done.returncode == 124
        assert "L2_Try: TIMEOUT" in done.stdout
        assert_gone(int((tmp_path / "pid").read_text()))

    def test_output_directory(self, tmp_path):
        done = self.lib(tmp_path, 'touch "$OUT/x"; echo "$OUT"')
        assert done.returncode == 0
        assert not Path(done.stdout.splitlines()[0]).exists()
        kept = tmp_path / "kept"
        assert self.lib(tmp_path, 'touch "$OUT/x"', OUT=str(kept)).returncode == 0
        assert (kept / "x").exists()
        done = self.lib(tmp_path, "true", OUT=str(kept))
        assert done.returncode == 2
        assert "is not empty" in done.stderr

    def test_checks_and_refusals(self, tmp_path):
        (tmp_path / "r.json").write_text('{"loss": 5.0}')
        fail = "bash -c 'echo it is wrong; exit 2'"
        assert self.lib(tmp_path, f"check {tmp_path}/r.json 'loss == 5'; refused 2 'is wrong' {fail}").returncode == 0
        assert self.lib(tmp_path, f"check {tmp_path}/r.json 'loss == 4'").returncode == 1
        assert self.lib(tmp_path, f"refused 1 'is wrong' {fail}").returncode == 1
        assert self.lib(tmp_path, f"refused 2 'other words' {fail}").returncode == 1
        assert self.lib(tmp_path, "refused 0 '' true; refused 2 '' true").returncode == 1


@pytest.mark.parametrize(("fresh", "coverage", "named"), [(False, "0", True), (True, "0", False), (False, "1", False)])
def test_scripts_may_fork_their_ranks(folder, tmp_path, monkeypatch, fresh, coverage, named):
    """Unless fresh ranks are asked for, or coverage is measured, which a fork would not be."""
    asked = []

    @contextmanager
    def server(log):
        asked.append(log)
        yield {SOCKET_ENV: "here"}

    monkeypatch.setattr(suite, "ForkServer", server)
    monkeypatch.setenv("NEMO_OPT_COVERAGE", coverage)
    monkeypatch.delenv(SOCKET_ENV, raising=False)
    write(folder, "L2_A", f'test "${{{SOCKET_ENV}:-none}}" = {"here" if named else "none"}')
    assert run(folder, tmp_path, fresh=fresh)[0] == 0
    assert asked == ([tmp_path / "logs" / "fork_server.log"] if named else [])
    assert SOCKET_ENV not in os.environ
