"""A directory appears whole or not at all: written beside its target, then renamed.

Decisions: the new directory is a hidden sibling of the target, so that the rename stays on one file system. Replacing an old
checkpoint exchanges the two names in one system call (`renameat2` with RENAME_EXCHANGE), because two renames would leave a moment
without any checkpoint; file systems that cannot do it get the two renames. What a killed save left behind is recognised by the host
and process id in its name, and removed by the next save to the same target. Needs no torch.
"""

import ctypes
import errno
import os
import re
import shutil
import socket
import uuid
from pathlib import Path

from nemo_opt.errors import CheckpointError

__all__ = ["check_target", "create_beside", "discard", "publish", "remove_stale"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_OURS = ("nemo_opt.json", "manifest.json", "weights")
"""A directory with one of these is a checkpoint, perhaps a damaged one; nothing else is ever overwritten."""


def check_target(target: Path, *, overwrite: bool, marks: tuple[str, ...] = _OURS) -> None:
    """Refuses a target that must not be replaced.

    Args:
        target: Where a directory is to appear.
        overwrite: Whether an older one may be replaced.
        marks: An older one is recognised by any of these names in it.

    Raises:
        CheckpointError: `target` is a file, or a non-empty directory and `overwrite` is False or it is nothing we would write.

    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a directory: choose another path")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists and is not empty: choose another path or pass overwrite=True")
    if not any((target / name).exists() for name in marks):
        raise CheckpointError(f"{target} is not empty and holds no {' or '.join(marks)}: it is not overwritten, choose another path")


def create_beside(target: Path) -> Path:
    """Makes an empty hidden directory next to `target` and returns it; makes the parents of `target` if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    return partial


def publish(partial: Path, target: Path, *, overwrite: bool = False, marks: tuple[str, ...] = _OURS) -> None:
    """Gives `partial`, flushed to disk, the name `target`; what lay there before is removed afterwards.

    Raises:
        CheckpointError: `target` has appeared meanwhile and must not be replaced.

    """
    _flush(partial)
    check_target(target, overwrite=overwrite, marks=marks)
    if target.is_dir() and any(target.iterdir()):
        _replace(partial, target)
    else:
        partial.rename(target)  # also replaces an empty directory
    _flush_directory(target.parent)


def _flush(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            with (Path(folder) / name).open("rb") as stream:
                os.fsync(stream.fileno())
        _flush_directory(Path(folder))


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    if _exchange(partial, target):
        discard(partial)  # now the old checkpoint
        return
    old = partial.with_name(partial.name + "-old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    discard(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def discard(folder: Path) -> None:
    """Removes `folder` and everything in it; nothing happens if it is gone."""
    if folder.exists():
        shutil.rmtree(folder)


def remove_stale(target: Path) -> list[Path]:
    """Removes what saves to `target` by processes of this host that no longer run have left behind, and returns it."""
    if not target.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}")
    stale = [p for p in target.parent.iterdir() if (m := pattern.fullmatch(p.name)) and not _is_alive(int(m[1]))]
    for folder in stale:
        discard(folder)
    return stale


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
