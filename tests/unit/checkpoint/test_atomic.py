import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opt.checkpoint import atomic
from nemo_opt.checkpoint.atomic import check_target, create_beside, discard, publish, remove_stale
from nemo_opt.errors import CheckpointError


def checkpoint(path, content):
    path.mkdir(parents=True)
    (path / "nemo_opt.json").write_text(content)
    return path


def new(target, content="new"):
    partial = create_beside(target)
    (partial / "nemo_opt.json").write_text(content)
    return partial


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_under_its_name_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "c"
    partial = new(target)
    assert partial.parent == target.parent
    assert partial.name.startswith(".c.partial-")
    assert not target.exists()
    publish(partial, target)
    assert (target / "nemo_opt.json").read_text() == "new"
    assert names(target.parent) == ["c"]


def test_an_empty_directory_is_replaced(tmp_path):
    target = tmp_path / "c"
    target.mkdir()
    check_target(target, overwrite=False)
    publish(new(target), target)
    assert names(target) == ["nemo_opt.json"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_old_checkpoint_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = checkpoint(tmp_path / "c", "old")
    (target / "left_over").touch()
    publish(new(target), target, overwrite=True)
    assert names(target) == ["nemo_opt.json"]
    assert (target / "nemo_opt.json").read_text() == "new"
    assert names(tmp_path) == ["c"]


def test_a_failed_second_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = checkpoint(tmp_path / "c", "old")
    partial = new(target)
    rename = Path.rename

    def fails_once(self, other):
        if self == partial:
            raise OSError(errno.EIO, "no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="no"):
        publish(partial, target, overwrite=True)
    assert (target / "nemo_opt.json").read_text() == "old"


def test_the_names_are_exchanged_in_one_step_where_the_system_can(tmp_path):
    first, second = checkpoint(tmp_path / "a", "A"), checkpoint(tmp_path / "b", "B")
    assert atomic._exchange(first, second)
    assert (first / "nemo_opt.json").read_text() == "B"


def fake_library(monkeypatch, code):
    class Library:
        @staticmethod
        def renameat2(*_):
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: Library() if code else object())


@pytest.mark.parametrize("code", [0, errno.EINVAL, errno.ENOSYS])
def test_systems_that_cannot_exchange_are_told_apart(monkeypatch, tmp_path, code):
    fake_library(monkeypatch, code)
    assert atomic._exchange(tmp_path / "a", tmp_path / "b") is False


def test_other_errors_of_the_exchange_are_raised(monkeypatch, tmp_path):
    fake_library(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        atomic._exchange(tmp_path / "a", tmp_path / "b")


def test_nothing_but_a_checkpoint_is_overwritten(tmp_path):
    target = checkpoint(tmp_path / "c", "old")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        check_target(target, overwrite=False)
    check_target(target, overwrite=True)
    (target / "nemo_opt.json").rename(target / "thesis.tex")
    with pytest.raises(CheckpointError, match="holds no nemo_opt"):
        check_target(target, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(target / "thesis.tex", overwrite=True)
    check_target(tmp_path / "nothing", overwrite=False)


def test_a_target_that_appeared_meanwhile_is_kept(tmp_path):
    target = tmp_path / "c"
    partial = new(target)
    checkpoint(target, "of another process")
    with pytest.raises(CheckpointError, match="exists"):
        publish(partial, target)
    assert (target / "nemo_opt.json").read_text() == "of another process"


def test_discard_forgives_what_is_gone(tmp_path):
    discard(tmp_path / "nothing")


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


def test_only_what_dead_processes_of_this_host_left_is_removed(tmp_path):
    host, dead = socket.gethostname(), dead_process()
    kept = [f".c.partial-{host}-{os.getpid()}-01234567", f".c.partial-elsewhere-{dead}-01234567", f".d.partial-{host}-{dead}-01234567", "c"]
    stale = f".c.partial-{host}-{dead}-01234567"
    for name in [*kept, stale]:
        (tmp_path / name / "weights").mkdir(parents=True)
    assert remove_stale(tmp_path / "c") == [tmp_path / stale]
    assert names(tmp_path) == sorted(kept)
    assert remove_stale(tmp_path / "no" / "c") == []


def test_a_process_of_another_user_is_alive(monkeypatch):
    def refuse(pid, sig):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert atomic._is_alive(1)


KILLED = """
import os, signal, sys
from pathlib import Path
from nemo_opt.checkpoint.atomic import create_beside
partial = create_beside(Path(sys.argv[1]))
(partial / "nemo_opt.json").write_text("half")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_one_whole_and_the_next_cleans_up(tmp_path):
    target = checkpoint(tmp_path / "c", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=Path(__file__).parents[3], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (target / "nemo_opt.json").read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_stale(target)
    assert names(tmp_path) == ["c"]
