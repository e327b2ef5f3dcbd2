"""Whole runs over small scripts: each way to end is told apart, and nothing that did not run passes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_opt.checkpoint.manifest import hash_files, list_files, write_manifest
from nemo_opt.errors import ConfigError
from nemo_opt.forked import SOCKET_ENV, ForkServerError
from nemo_opt.testing import fixtures, suite
from nemo_opt.testing.suite import runner, supplies

ROOT = Path(__file__).parents[3]


def statuses(ended):
    return {name: row["status"] for name, row in ended.items()}


def test_ways_to_end(functional, capsys):
    functional.write("L2_Good", "echo fine; echo more >&2; holds")
    functional.write("L2_Bad", "echo the reason; exit 3")
    functional.write("L2_Slow", "sleep 60", timeout=1)
    functional.write("L2_Step", "exit 124")
    functional.write("L2_Killed", "bash -c 'kill -KILL $$'; holds")
    functional.write("L2_Gpu", device="cuda")
    functional.write("L2_Machine", "exit 75")
    code, ended = functional.run()
    assert code == 1
    assert statuses(ended) == {
        "L2_Bad": "fail",
        "L2_Good": "pass",
        "L2_Gpu": "not run",
        "L2_Killed": "fail",
        "L2_Machine": "infrastructure",
        "L2_Slow": "timeout",
        "L2_Step": "timeout",
    }
    assert ended["L2_Killed"]["reason"] == "exit code 137: a command was ended by SIGKILL"
    assert ended["L2_Gpu"]["reason"] == "no CUDA device here"
    assert ended["L2_Gpu"]["log"] is None
    assert Path(ended["L2_Good"]["log"]).read_text() == "fine\nmore\n"
    assert ended["L2_Good"]["assertions"][0]["values"] == {"loss": 0.5}
    output = capsys.readouterr().out
    assert "    | the reason" in output, "the end of a failing log is shown"
    assert "1 pass, 2 fail, 2 timeout, 1 infrastructure, 1 not run" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("7 scripts in ")


SWALLOWED = """holds; (echo '{"kind": "check", "what": "x < 0", "holds": false}' >>"$NEMO_OPT_ASSERTIONS"; exit 1) || true"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("false\nholds", "exit code 1"),
        ("false | true\nholds", "exit code 1"),
        ("missing_command\nholds", "exit code 127"),
        ('echo "$UNSET_VARIABLE"\nholds', "exit code 1"),
        ("true", "asserted nothing"),
        (SWALLOWED, "exit code 0, but does not hold: x < 0"),
        ('holds; echo "{" >>"$NEMO_OPT_ASSERTIONS"', "is damaged"),
    ],
)
def test_no_failure_is_silent(functional, body, reason):
    """A first command that fails, whatever comes after it; a script that asserted nothing, or whose failed assertion was swallowed."""
    functional.write("L2_A", body)
    code, ended = functional.run()
    assert (code, ended["L2_A"]["status"]) == (1, "fail")
    assert reason in ended["L2_A"]["reason"]


def test_good_scripts(functional, monkeypatch):
    monkeypatch.setenv("OUT", "would be shared")
    functional.write("L2_A_TP2", ranks=2)
    functional.write("L0_B", 'test -x "$PYTHON"; test -z "${OUT:-}"; holds')
    assert functional.run()[0] == 0
    code, ended = functional.run(tier="L0")
    assert (code, list(ended)) == (0, ["L0_B"])
    assert list(functional.run(only=["_A"])[1]) == ["L2_A_TP2"]
    assert list(functional.run(layout="TP2")[1]) == ["L2_A_TP2"]


def test_old_assertions_do_not_count(functional):
    functional.write("L2_A")
    assert functional.run()[0] == 0
    functional.write("L2_A", "true")
    assert functional.run()[1]["L2_A"]["reason"].startswith("asserted nothing")


def test_a_script_that_needs_a_gpu_is_not_passed(functional):
    functional.write("L2_Gpu", device="cuda")
    assert functional.run()[0] == 1, "nothing ran"
    functional.write("L2_A")
    code, ended = functional.run()
    assert (code, statuses(ended)) == (0, {"L2_A": "pass", "L2_Gpu": "not run"})
    code, ended = functional.run(device="cuda")
    assert (code, statuses(ended)) == (1, {"L2_A": "not run", "L2_Gpu": "not run"}), "a GPU job without its GPU"


def test_an_empty_selection_is_no_success(functional):
    functional.write("L2_A")
    with pytest.raises(ConfigError, match="no script selected by names \\['Nothing'\\]"):
        functional.run(only=["Nothing"])


@pytest.mark.parametrize("options", [{"jobs": 0}, {"timeout_scale": 0.0}, {"timeout_scale": float("nan")}, {"html": Path(__file__).parent}])
def test_bad_options_are_refused_before_anything_runs(functional, options):
    functional.write("L2_A", "touch $RAN")
    with pytest.raises(ConfigError):
        functional.run(**options)
    assert not functional.logs.exists()


def test_time_limits_scale(functional):
    functional.write("L2_A", 'test "$NEMO_OPT_TIMEOUT_SCALE" = 0.1; sleep 60', timeout=1)
    code, ended = functional.run(timeout_scale=0.1)
    assert (code, ended["L2_A"]["reason"]) == (1, "longer than 0.1 s")
    assert ended["L2_A"]["time_s"] < 10


def test_the_longest_comes_first(functional, capsys):
    for name, limit in (("L2_A", 10), ("L2_B", 30), ("L2_C", 20)):
        functional.write(name, f"sleep {0.15 if name == 'L2_C' else 0}; holds", timeout=limit)

    def order():
        return [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("        starts")]

    functional.run(jobs=1)
    assert order() == ["L2_B", "L2_C", "L2_A"], "of what is not known, by the limit"
    functional.run(jobs=1)
    assert order()[0] == "L2_C"


class TestQuarantine:
    def test_it_does_not_run_unless_asked_for(self, functional, capsys):
        functional.write("L2_A")
        functional.write("L2_Known", "exit 1", quarantined=True, issue="#7")
        code, ended = functional.run()
        assert (code, list(ended)) == (0, ["L2_A"])
        assert "in quarantine until 2999-01-01, not run: L2_Known, #7" in capsys.readouterr().out

    def test_it_is_reported_without_failing_the_run(self, functional, capsys):
        functional.write("L2_A")
        functional.write("L2_Known", "exit 1", quarantined=True, issue="#7")
        code, ended = functional.run(quarantined=True)
        assert (code, statuses(ended)) == (0, {"L2_A": "pass", "L2_Known": "fail"})
        assert ended["L2_Known"]["quarantine"] == {"issue": "#7", "expires": "2999-01-01"}
        assert "1 fail in quarantine" in capsys.readouterr().out
        functional.write("L2_A", "exit 1")
        assert functional.run(quarantined=True)[0] == 1, "the others count as ever"

    def test_an_expired_one_stops_every_run(self, functional):
        functional.write("L2_A")
        functional.write("L2_Known", quarantined=True, expires="2020-01-01")
        with pytest.raises(ConfigError, match="expired on 2020-01-01"):
            functional.run()

    def test_ten_passes_end_it(self, functional, capsys):
        functional.write("L2_Known", quarantined=True)
        for number in range(1, 11):
            functional.run(quarantined=True)
            assert ("ready to return" in capsys.readouterr().out) == (number == 10)


class TestFixtures:
    @pytest.fixture
    def made(self, tmp_path, monkeypatch):
        root = tmp_path / "fixtures"
        (root / "teacher").mkdir(parents=True)
        (root / "teacher" / "weights").write_text("good")
        write_manifest(root, hash_files(root, list_files(root)))
        monkeypatch.setattr(fixtures, "build", lambda: fixtures.Fixtures(root))
        return root

    def test_they_are_made_once_before(self, functional, monkeypatch, made):
        calls = []
        monkeypatch.setattr(fixtures, "build", lambda: calls.append(1) or fixtures.Fixtures(made))
        for name in "AB":
            functional.write(f"L2_{name}", needs="fixtures")
        assert (functional.run()[0], len(calls)) == (0, 1)
        functional.write("L2_C")
        assert (functional.run(only=["C"])[0], len(calls)) == (0, 1), "only where they are needed"

    def test_without_them_a_script_is_no_pass(self, functional, monkeypatch):
        def build():
            raise ConfigError("no disk")

        monkeypatch.setattr(fixtures, "build", build)
        functional.write("L2_A", needs="fixtures")
        functional.write("L2_C")
        code, ended = functional.run()
        assert (code, statuses(ended)) == (75, {"L2_A": "infrastructure", "L2_C": "pass"})
        assert (ended["L2_A"]["reason"], ended["L2_A"]["log"]) == ("no fixtures: no disk", None)

    @pytest.mark.parametrize("then", ["holds", "exit 1"])
    def test_a_script_during_which_they_were_corrupted_is_no_pass(self, functional, made, then):
        functional.write("L2_A", f"echo evil >{made}/teacher/weights; {then}", needs="fixtures")
        code, ended = functional.run()
        assert (code, ended["L2_A"]["status"]) == (75, "infrastructure")
        assert "fixtures were damaged while it ran" in ended["L2_A"]["reason"]
        assert "weights" in ended["L2_A"]["reason"]


class TestForkServer:
    @pytest.fixture
    def server(self, monkeypatch, tmp_path):
        """A listening socket; its path is what a script sees."""
        asked, address = [], tmp_path / "socket"

        @contextmanager
        def server(log):
            asked.append(log)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(address))
                listener.listen()
                yield {SOCKET_ENV: str(address)}

        server.asked, server.address = asked, address
        monkeypatch.setattr(supplies, "ForkServer", server)
        return server

    @pytest.mark.parametrize(("fresh", "named"), [(False, True), (True, False)])
    def test_scripts_may_fork_their_ranks(self, functional, server, fresh, named):
        """Unless fresh ranks are asked for."""
        functional.write("L2_A", f'test "${{{SOCKET_ENV}:-none}}" = {server.address if named else "none"}; holds')
        assert functional.run(fresh=fresh)[0] == 0
        assert server.asked == ([functional.logs / "fork_server.log"] if named else [])
        assert SOCKET_ENV not in os.environ

    def test_one_that_does_not_start_is_infrastructure(self, functional, monkeypatch):
        @contextmanager
        def server(log):
            raise ForkServerError("ended with exit code 1")
            yield

        monkeypatch.setattr(supplies, "ForkServer", server)
        functional.write("L2_A")
        code, ended = functional.run(fresh=False)
        assert (code, ended["L2_A"]["reason"]) == (75, "no fork server: ended with exit code 1")

    def test_one_that_is_gone_is_infrastructure(self, functional, server):
        """And later scripts do without."""
        functional.write("L2_First", "exit 2", timeout=30)
        functional.write("L2_Second", f'rm "${SOCKET_ENV}"; exit 2', timeout=20)
        functional.write("L2_Third", f'test -z "${{{SOCKET_ENV}:-}}"; holds', timeout=10)
        code, ended = functional.run(fresh=False, jobs=1)
        assert (code, statuses(ended)) == (1, {"L2_First": "fail", "L2_Second": "infrastructure", "L2_Third": "pass"})
        assert ended["L2_Second"]["reason"].startswith("the fork server is gone")
        assert ended["L2_Second"]["reason"].endswith("(fail: exit code 2)")

    def test_who_listens(self, server, tmp_path):
        with server(tmp_path / "log"):
            assert supplies._listens(str(server.address))
        assert server.address.exists()
        assert not supplies._listens(str(server.address))
        assert not supplies._listens(str(tmp_path / "missing"))


def test_a_full_disk_is_infrastructure(functional, monkeypatch):
    functional.write("L2_A", "exit 1")
    functional.write("L2_B")
    monkeypatch.setattr(supplies.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    code, ended = functional.run()
    assert (code, statuses(ended)) == (75, {"L2_A": "infrastructure", "L2_B": "pass"})
    assert "the disk is full: 1000 bytes free" in ended["L2_A"]["reason"]


def test_no_room_for_a_log_is_infrastructure(functional, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "run_process", full)
    functional.write("L2_A")
    code, ended = functional.run()
    assert (code, ended["L2_A"]["status"]) == (75, "infrastructure")
    assert "No space left on device" in ended["L2_A"]["reason"]


def test_a_cancelled_run_leaves_no_script_behind(functional, tmp_path):
    functional.write("L2_A", f"echo $$ >{tmp_path}/pid; sleep 60")
    command = [sys.executable, "-m", "nemo_opt.cli", "suite", "run", "--fresh", "--folder", str(functional.folder)]
    command += ["--logs", str(functional.logs), "--history", str(functional.history)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        pid = int(awaited(tmp_path / "pid"))
        run.send_signal(signal.SIGTERM)
        assert run.communicate(timeout=20)[1] == "cancelled by SIGTERM: scripts that run are ended\n"
        assert run.returncode == 143
    finally:
        run.kill()
    assert not Path(f"/proc/{pid}").exists()
    assert not functional.history.exists(), "a part of a run is no run"


def awaited(path):
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def test_the_command_line(functional, capsys):
    from nemo_opt.cli import main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["suite", *arguments, "--folder", str(functional.folder)])
        return end.value.code, capsys.readouterr().out

    functional.write("L2_A_TP2", ranks=2, memory=1.5)
    functional.write("L2_Known", "exit 1", quarantined=True)
    code, output = call("list", "--json")
    assert (code, output.count("\n")) == (0, 1)
    row = {"name": "L2_A_TP2", "tier": "L2", "layout": "TP2", "ranks": 2, "timeout": 30, "device": "any", "needs": [], "owner": "@x"}
    assert json.loads(output) == [row | {"memory": 1.5, "quarantine": None}]
    code, output = call("list", "--quarantined")
    assert (code, "until 2999-01-01: #1" in output, "1.5 GiB" in output) == (0, True, True)
    files = {kind: functional.logs.parent / "reports" / f"r.{kind}" for kind in ("junit", "json", "html")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    paths = ["--logs", str(functional.logs), "--history", str(functional.history)]
    code, output = call("run", "--fresh", "--jobs", "2", "--timeout-scale", "2", "--device", "cpu", "--quarantined", *paths, *options)
    assert code == 0
    assert all(path.exists() for path in files.values())
    assert suite.Status(json.loads(files["json"].read_text())["scripts"][1]["status"]) is suite.Status.FAIL
