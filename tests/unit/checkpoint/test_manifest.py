import hashlib
import io
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.checkpoint import manifest
from nemo_opt.checkpoint.manifest import FileEntry, check_contents, check_entries, hash_files, list_files, read_manifest, write_manifest
from nemo_opt.errors import CheckpointError


@pytest.fixture
def sealed(tmp_path):
    """A directory of three files with a manifest."""
    (tmp_path / "sub").mkdir()
    for name, content in {"a.bin": b"0123456789", "sub/b.bin": b"x" * 5000, ".hidden": b""}.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, hash_files(tmp_path, list_files(tmp_path)))
    return tmp_path


def check(root):
    entries = read_manifest(root)
    check_entries(root, entries)
    check_contents(root, entries)


def test_an_untouched_directory_passes(sealed):
    check(sealed)
    assert list_files(sealed) == [".hidden", "a.bin", "sub/b.bin"]


def test_entries_are_sizes_and_sha256_also_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 7)
    (tmp_path / "f").write_bytes(b"abc" * 100)
    assert hash_files(tmp_path, ["f"]) == {"f": FileEntry(300, hashlib.sha256(b"abc" * 100).hexdigest())}


def test_files_are_hashed_side_by_side(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(manifest.os, "sched_getaffinity", lambda process: {0, 1})
    both_at_work, hash_file = threading.Barrier(2, timeout=20), manifest._hash_file

    def wait_and_hash(*arguments):
        both_at_work.wait()
        return hash_file(*arguments)

    monkeypatch.setattr(manifest, "_hash_file", wait_and_hash)
    assert hash_files(tmp_path, ["b", "a"]) == {name: FileEntry(1, hashlib.sha256(name.encode()).hexdigest()) for name in "ba"}


@pytest.mark.parametrize(
    ("damage", "named", "kind"),
    [
        (lambda root: (root / "a.bin").unlink(), "a.bin", "is missing"),
        (lambda root: (root / "a.bin").write_bytes(b"012"), "a.bin", "is truncated: 3 bytes on disk, 10 in"),
        (lambda root: (root / "a.bin").write_bytes(b"01234567890"), "a.bin", "is altered: 11 bytes on disk, 10 in"),
        (lambda root: (root / "sub/b.bin").write_bytes(b"x" * 4999 + b"y"), "b.bin", "is altered: SHA-256"),
        (lambda root: (root / "sub/common.pt").write_bytes(b""), "common.pt", "is not listed"),
        (lambda root: (root / "link").symlink_to(root / "a.bin"), "link", "symbolic link"),
        (lambda root: (root / "manifest.json").unlink(), "manifest.json", "is missing"),
        (lambda root: (root / "manifest.json").write_text("{"), "manifest.json", "is damaged"),
        (lambda root: (root / "manifest.json").write_text('{"version": 1, "files": {"a": {}}}'), "manifest.json", "is damaged"),
        (lambda root: (root / "manifest.json").write_text('{"version": 1, "files": []}'), "manifest.json", "is damaged"),
        (lambda root: (root / "manifest.json").write_text('{"version": 9, "files": {}}'), "manifest.json", "version 9"),
    ],
)
def test_damage_is_refused_by_name(sealed, damage, named, kind):
    damage(sealed)
    with pytest.raises(CheckpointError, match=kind) as refused:
        check(sealed)
    assert named in str(refused.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside"])
def test_names_outside_of_the_directory_are_refused(sealed, name):
    (sealed / "manifest.json").write_text(json.dumps({"version": 1, "files": {name: {"bytes": 1, "sha256": "0"}}}))
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(sealed)


def test_several_missing_files_are_counted(sealed):
    (sealed / "a.bin").unlink()
    (sealed / ".hidden").unlink()
    with pytest.raises(CheckpointError, match=r"\.hidden is missing \(and 1 more\)"):
        check(sealed)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "limit", "seen"), [(Terminal, 0, True), (io.StringIO, 0, False), (Terminal, 1 << 30, False)])
def test_a_bar_is_shown_for_large_checkpoints_on_a_terminal_only(sealed, monkeypatch, stream, limit, seen):
    monkeypatch.setattr(manifest, "PROGRESS_FROM_BYTES", limit)
    monkeypatch.setattr("sys.stderr", terminal := stream())
    hash_files(sealed, list_files(sealed), progress=True)
    assert ("checksums" in terminal.getvalue()) is seen


@settings(max_examples=20, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, content, data):
    root = tmp_path_factory.mktemp("any")
    (root / "f").write_bytes(content)
    write_manifest(root, hash_files(root, ["f"]))
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    (root / "f").write_bytes(changed)
    with pytest.raises(CheckpointError, match="f is altered"):
        check(root)
