"""Where each rank was when its job was ended from outside: by a scheduler, a time limit, a person who sends SIGTERM to what hangs.

Decisions:
- A rank writes its stacks from within the signal's handler, in C: it need not come back from the collective it hangs in. Then it ends, as
  by default.
- They go to a file in the job's directory and are shown only by a parent that was itself told to end: ranks that are ended because another
  one failed are of no interest beside that one's message.
"""

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["TerminatedError", "keep", "read", "terminable"]

_WAIT_S = 2.0  # for ranks to have written; the signal reaches them within milliseconds, through the fork server too
_POLL_S = 0.02
_MOST_LINES = 60  # of one rank; its main thread comes last, innermost call first


class TerminatedError(BaseException):
    """The process was told to end by SIGTERM."""


def keep(job: Path, rank: int) -> None:
    """In a rank: writes the stacks of all its threads into `job` at SIGTERM, then lets the signal end it."""
    file = (job / f"stacks-{rank}.txt").open("w")
    faulthandler.register(signal.SIGTERM, file=file, all_threads=True, chain=True)  # which keeps the file open


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `TerminatedError` in the block, so that what it has started can be ended and asked; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break what the first has begun
        raise TerminatedError

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read(job: Path, devices: int) -> str:
    """What the ranks of `job` have written, each under its name; waits for them a moment."""
    files = {rank: job / f"stacks-{rank}.txt" for rank in range(devices)}
    deadline = time.monotonic() + _WAIT_S
    while not all(_text(file) for file in files.values()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return "\n".join(f"--- rank {rank}\n{_cut(_text(file)) or 'not known'}" for rank, file in files.items())


def _text(file: Path) -> str:
    return file.read_text(errors="replace").strip() if file.exists() else ""


def _cut(text: str) -> str:
    lines = text.splitlines()
    left_out = len(lines) - _MOST_LINES
    return "\n".join([f"({left_out} lines left out)", *lines[-_MOST_LINES:]] if left_out > 0 else lines)
