"""The process of one script: a session of its own, which ends with it, or at its time limit, whatever it has started."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "run_process"]

_POLL_S = 0.02
_GRACE_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None
    """Its exit code, negative for a signal; None where it was ended at its time limit."""
    time_s: float
    """How long it took."""


def run_process(script: Path, log: Path, environment: Mapping[str, str], limit_s: float, stop: threading.Event) -> Ended:
    """Runs `script` by bash, all that it prints in `log`. Nothing of it is left when this returns.

    Args:
        script: The file.
        log: Written anew.
        environment: All of it.
        limit_s: After these seconds it is ended.
        stop: Ends it too.

    """
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", str(script)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            over = _until(lambda: process.poll() is not None or stop.is_set(), start + limit_s)
            code = process.poll() if over else None
        finally:
            _end_session(process)
    return Ended(code, time.monotonic() - start)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which a script passes on to its step, then SIGKILL for all of the session: each step is a process group of its own."""
    if process.poll() is None:
        process.terminate()
        _until(lambda: process.poll() is not None, time.monotonic() + _GRACE_S)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in _living(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, kind)
        if _until(lambda: not _living(process.pid), time.monotonic() + _GRACE_S):
            break
    process.wait()


def _living(session: int) -> list[int]:
    """Processes of the session that are not yet dead."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                state, _, _, member = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if member == str(session) and state != "Z":
                    found.append(int(entry.name))
    return found


def _until(done: Callable[[], bool], deadline: float) -> bool:
    """Waits; False when the time is over."""
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
