"""The manifest: size and SHA-256 of every file of a checkpoint, so that damage is found, and named, before any long work.

Decisions: checksums protect from accidents, not from an attacker (who would rewrite the manifest too); what a file may make a
process do is the business of `safe_unpickle`. A file that the manifest does not list is refused as well, because Megatron-Core
changes its behaviour when it meets certain file names. Symbolic links are refused: they would be copied or hashed as what they
point to. Needs no torch.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from nemo_opt.errors import CheckpointError

__all__ = ["MANIFEST_NAME", "FileEntry", "check_contents", "check_entries", "hash_files", "list_files", "read_manifest", "write_manifest"]

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
CHUNK_BYTES = 8 << 20
"""Read size while hashing: large enough to keep SHA-256 busy, small beside any model."""
MAX_FILES_AT_ONCE = 8
"""Hashed, each on a core of its own: at 1 GB/s each, more than most disks give."""
PROGRESS_FROM_BYTES = 1 << 30
"""A progress bar appears above this size: SHA-256 takes about 1 s a GiB, and shorter waits need none."""


class FileEntry(NamedTuple):
    """What the manifest knows about one file."""

    bytes: int
    """Size."""
    sha256: str
    """Checksum of the contents, hexadecimal."""


def list_files(root: Path) -> list[str]:
    """Names of all files below `root` except the manifest, relative, with forward slashes, sorted.

    Raises:
        CheckpointError: a symbolic link lies among them.

    """
    names = []
    for folder, subfolders, files in os.walk(root):
        for name in subfolders + files:
            if (Path(folder) / name).is_symlink():
                raise CheckpointError(f"{Path(folder) / name} is a symbolic link; a checkpoint holds plain files only")
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(name for name in names if name != MANIFEST_NAME)


def hash_files(root: Path, names: Iterable[str], *, progress: bool = False) -> dict[str, FileEntry]:
    """Entry of each named file below `root`, one at a time on each core; `progress` allows a bar on stderr when it is a terminal."""
    paths = {name: root / name for name in names}
    total = sum(path.stat().st_size for path in paths.values())
    visible = progress and total >= PROGRESS_FROM_BYTES and sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="checksums", disable=not visible) as bar:
        taking_turns = threading.Lock()

        def advance(size: int) -> None:
            with taking_turns:
                bar.update(size)

        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_FILES_AT_ONCE)) as threads:
            return dict(zip(paths, threads.map(lambda path: _hash_file(path, advance), paths.values()), strict=True))


def _hash_file(path: Path, advance: Callable[[int], None]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)  # which lets other threads run
            size += len(chunk)
            advance(len(chunk))
    return FileEntry(size, digest.hexdigest())


def write_manifest(root: Path, entries: Mapping[str, FileEntry]) -> None:
    """Writes `root`/manifest.json."""
    files = {name: entry._asdict() for name, entry in sorted(entries.items())}
    (root / MANIFEST_NAME).write_text(json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path) -> dict[str, FileEntry]:
    """Entries of `root`/manifest.json.

    Raises:
        CheckpointError: it is missing, not JSON, of another version, or names files outside of `root`.

    """
    path = root / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["version"], content["files"]
        entries = {name: FileEntry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, or not one written by nemo_opt") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if version != MANIFEST_VERSION:
        raise CheckpointError(f"{path} has version {version!r}, this nemo_opt reads {MANIFEST_VERSION}: update nemo_opt")
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{path} names {name!r}, which lies outside of the checkpoint")
    return entries


def check_entries(root: Path, entries: Mapping[str, FileEntry]) -> None:
    """Compares the files below `root` with `entries` by name and size, which reads no contents.

    Raises:
        CheckpointError: naming a missing, truncated or unlisted file.

    """
    present = set(list_files(root))
    if missing := sorted(entries.keys() - present):
        raise CheckpointError(f"{root / missing[0]} is missing{_and_more(missing)}: the checkpoint is incomplete")
    if unlisted := sorted(present - entries.keys()):
        raise CheckpointError(f"{root / unlisted[0]} is not listed in {MANIFEST_NAME}{_and_more(unlisted)}: remove it, or get a whole copy")
    for name, entry in sorted(entries.items()):
        if (size := (root / name).stat().st_size) != entry.bytes:
            kind = "truncated" if size < entry.bytes else "altered"
            raise CheckpointError(f"{root / name} is {kind}: {size} bytes on disk, {entry.bytes} in {MANIFEST_NAME}")


def check_contents(root: Path, entries: Mapping[str, FileEntry], *, progress: bool = False) -> None:
    """Compares the checksums of the files named by `entries`.

    Raises:
        CheckpointError: naming the first altered file.

    """
    for name, found in hash_files(root, sorted(entries), progress=progress).items():
        if found.sha256 != entries[name].sha256:
            wanted = entries[name].sha256
            raise CheckpointError(f"{root / name} is altered: SHA-256 {found.sha256[:16]}... on disk, {wanted[:16]}... in {MANIFEST_NAME}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
