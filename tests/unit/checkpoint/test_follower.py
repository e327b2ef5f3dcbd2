"""Checksums of files that are being written."""

import hashlib
import os
import time

import pytest

from nemo_opt.checkpoint.follower import Follower
from nemo_opt.checkpoint.manifest import FileEntry, hash_files


def written(path, parts, pause_s=0.0):
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
            time.sleep(pause_s)


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (10, 1000, 3), (1 << 20, 5, 9 << 20)], ids=str)
@pytest.mark.parametrize("pause_s", [0.0, 0.01])
def test_it_is_that_of_the_whole_file(tmp_path, sizes, pause_s):
    parts = [os.urandom(size) for size in sizes]
    follower = Follower(tmp_path / "file")
    written(tmp_path / "file", parts, pause_s)
    content = b"".join(parts)
    assert follower.entry() == FileEntry(len(content), hashlib.sha256(content).hexdigest())
    assert follower.entry() == hash_files(tmp_path, ["file"])["file"]


def test_a_file_that_was_there_and_is_not_written_any_more(tmp_path):
    written(tmp_path / "file", [b"abc"])
    assert Follower(tmp_path / "file").entry() == FileEntry(3, hashlib.sha256(b"abc").hexdigest())


def test_a_file_that_never_comes_has_no_entry(tmp_path):
    assert Follower(tmp_path / "missing").entry() is None


def test_what_cannot_be_read_has_no_entry(tmp_path):
    assert Follower(tmp_path).entry() is None  # a folder
