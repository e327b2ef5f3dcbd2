"""The checksum of a file that another thread is writing: while that one waits for the disk, this one reads what is in the system's cache.

Right only for files that are written from begin to end, as those of a distributed checkpoint are. Needs no torch.
"""

import hashlib
import threading
from pathlib import Path

from nemo_opt.checkpoint.manifest import CHUNK_BYTES, FileEntry

__all__ = ["Follower"]

_PAUSE_S = 0.002
"""Between two looks at a file that has not grown: a few megabytes at the speed of a disk."""


class Follower:
    """Reads behind the writer from its construction on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = threading.Event()
        self._entry: FileEntry | None = None
        self._thread = threading.Thread(target=self._follow, name=f"checksum of {path.name}", daemon=True)
        self._thread.start()

    def entry(self) -> FileEntry | None:
        """Size and checksum of the whole file, which is written by now; None where it cannot be read, or was read too early."""
        self._written.set()
        self._thread.join()
        return self._entry

    def _follow(self) -> None:
        while not self._path.exists() and not self._written.is_set():
            self._written.wait(_PAUSE_S)
        digest, size = hashlib.sha256(), 0
        try:
            with self._path.open("rb", buffering=0) as stream:
                while True:
                    is_whole = self._written.is_set()  # asked before the read, which then sees the end
                    if chunk := stream.read(CHUNK_BYTES):
                        digest.update(chunk)
                        size += len(chunk)
                    elif is_whole:
                        break
                    else:
                        self._written.wait(_PAUSE_S)
            if size == self._path.stat().st_size:  # on a remote file system what was written may be seen late
                self._entry = FileEntry(size, digest.hexdigest())
        except OSError:
            return
