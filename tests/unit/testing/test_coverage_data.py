"""Coverage that lost a process fails: real processes, measured, that end in order, by a signal, and without a word."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RCFILE = "[run]\nparallel = true\nplugins = ci.measured\npatch =\n    subprocess\n    _exit\n    fork\n"

spec = importlib.util.spec_from_file_location("coverage_data", ROOT / "ci/coverage_data.py")
coverage_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage_data)

PARENT = """
import os, subprocess, sys

def start(code, **environment):
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment)

if sys.argv[1] == "in order":
    start("print('fine')", RANK="1", WORLD_SIZE="2").wait()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
elif sys.argv[1] == "killed":
    child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.kill()
    child.wait()
elif sys.argv[1] == "lost":
    start("import ctypes; ctypes.CDLL(None)._exit(0)", RANK="1", WORLD_SIZE="2").wait()
elif sys.argv[1] == "shell":
    start("import os, signal; os.abort()", NEMO_OPT_COVERAGE_KILLED="1").wait()
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What is wrong with a measured run of PARENT, and the line about its amount."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "rc").write_text(RCFILE)
    (folder / "parent.py").write_text(PARENT)

    def run(case):
        data = folder / case
        (data / "marks").mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "NEMO_OPT_COVERAGE"))}
        environment |= {"NEMO_OPT_COVERAGE_MARKS": str(data / "marks"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={folder / 'rc'}", f"--data-file={data / '.coverage'}"]
        subprocess.run([*command, str(folder / "parent.py"), case], env=environment, check=True, timeout=120, cwd=folder)
        return coverage_data.faults(data)

    return run


def test_processes_that_end_in_order_leave_their_data(measured):
    found, amount = measured("in order")
    assert found == []
    assert amount.endswith(" of 3 processes; 0 more were ended on purpose; 0 lost theirs")


def test_a_process_may_be_ended_on_purpose(measured):
    found, amount = measured("killed")
    assert found == ["no rank but the first was measured"]
    assert amount.endswith("1 more were ended on purpose; 0 lost theirs")


def test_a_script_may_announce_it(measured):
    assert measured("shell")[0] == ["no rank but the first was measured"]


def test_a_lost_rank_is_named(measured):
    found, amount = measured("lost")
    assert len(found) == 2
    assert found[0].startswith("no data of rank 1 of 2, process ")
    assert "ctypes.CDLL(None)._exit(0)" in found[0]
    assert amount.endswith("0 more were ended on purpose; 1 lost theirs")


@pytest.fixture
def folder(tmp_path):
    """Marks and data files as two ranks of one job leave them, under a launcher."""
    (tmp_path / "marks").mkdir()
    for pid, parent, names in [(1, 0, {}), (2, 1, {"RANK": "0"}), (3, 1, {"RANK": "1"})]:
        job = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "7"} if names else {}
        mark = {"host": "h", "pid": pid, "group": 1, "parent": parent, "command": "-m x", **names, **job}
        (tmp_path / f"marks/started.h.{pid}.1.json").write_text(json.dumps(mark))
        (tmp_path / f".coverage.h.pid{pid}.Xabcx").touch()
    return tmp_path


def test_all_is_well(folder):
    assert coverage_data.faults(folder) == ([], "3 data files of 3 processes; 0 more were ended on purpose; 0 lost theirs")


@pytest.mark.parametrize(
    ("ended", "faults"),
    [
        (None, ["no data of rank 1 of 2, process 3 on h (-m x)"]),
        ({"pid": 3}, []),
        ({"group": 1}, []),
        ({"pid": 1}, ["no data of rank 1 of 2, process 3 on h (-m x)"]),
        ({"pid": 2}, ["no data of rank 1 of 2, process 3 on h (-m x)"]),
    ],
    ids=["nobody", "it", "its group", "a parent that left its data", "another"],
)
def test_who_was_ended(folder, ended, faults):
    (folder / ".coverage.h.pid3.Xabcx").unlink()
    if ended:
        (folder / "marks/ended.h.1.1.json").write_text(json.dumps({"host": "h", **ended}))
    found = coverage_data.faults(folder)[0]
    assert [fault for fault in found if fault != "no rank but the first was measured"] == faults


def test_children_of_a_killed_parent_go_with_it(folder):
    for pid in (1, 3):
        (folder / f".coverage.h.pid{pid}.Xabcx").unlink()
    (folder / "marks/ended.h.9.1.json").write_text(json.dumps({"host": "h", "pid": 1}))
    assert coverage_data.faults(folder)[0] == ["no rank but the first was measured"]


def test_a_rank_that_was_not_measured_is_missed(folder):
    (folder / "marks/started.h.3.1.json").unlink()
    (folder / ".coverage.h.pid3.Xabcx").unlink()
    assert "job 7: only ranks [0] of 2 were measured" in coverage_data.faults(folder)[0]


def test_nothing_is_no_success(folder, capsys):
    shutil.rmtree(folder / "marks")
    (folder / "marks").mkdir()
    for file in folder.glob(".coverage*"):
        file.unlink()
    assert coverage_data.main([str(folder)]) == 1
    assert "nothing was measured" in capsys.readouterr().out
