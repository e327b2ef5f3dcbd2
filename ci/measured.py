"""A coverage plugin that measures nothing: processes that are measured leave a mark when they start, and when they end another one.

A process that a signal ends leaves no data, and tests end many on purpose. So whoever sends such a signal says so, and a process without
data that nobody ended has lost it. `ci/coverage_data.py` judges. Named in pyproject.toml; marks go to $NEMO_OPT_COVERAGE_MARKS, which
`ci/coverage.sh` sets; without it nothing happens. A shell script that ends processes starts them with NEMO_OPT_COVERAGE_KILLED=1.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["coverage_init"]

_NAMES = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PYTEST_CURRENT_TEST", "NEMO_OPT_COVERAGE_KILLED")
_ENDING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGABRT)


def coverage_init(registry: object, options: dict[str, Any]) -> None:  # noqa: ARG001 - coverage's signature
    """Called where a measurement begins, in forked processes too."""
    if "NEMO_OPT_COVERAGE_MARKS" in os.environ:
        who = {"pid": os.getpid(), "group": os.getpgid(0), "parent": os.getppid(), "command": " ".join(sys.orig_argv[1:])[:200]}
        _mark("started", who | {name: os.environ[name] for name in _NAMES if name in os.environ})
        if not hasattr(os.kill, "marks"):
            os.kill, os.killpg = _marking(os.kill, "pid"), _marking(os.killpg, "group")


def _mark(kind: str, content: dict[str, Any]) -> None:
    host = socket.gethostname()
    file = Path(os.environ["NEMO_OPT_COVERAGE_MARKS"]) / f"{kind}.{host}.{os.getpid()}.{time.time_ns()}.json"
    file.write_text(json.dumps({"host": host, **content}))


def _marking(kill: Callable[[int, int], None], target: str) -> Callable[[int, int], None]:
    """`kill`, which says whom it ends."""

    def marking(number: int, sent: int) -> None:
        if sent in _ENDING and "NEMO_OPT_COVERAGE_MARKS" in os.environ:
            _mark("ended", {target: number})
        kill(number, sent)

    marking.marks = True  # type: ignore[attr-defined]
    return marking
