"""The last runs of the suite on this machine: one JSON line each, for what is usual and what has changed.

A line that cannot be read (a killed run, another version) is left out: the past may inform a run, never break it.
"""

import fcntl
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_opt.testing.suite.verdict import Outcome, Status

__all__ = ["History", "Past", "Run", "default_place", "pasts"]

KEPT_RUNS = 200
"""Of a file, when it is written."""
_USUAL_OF = 10
_STRAIGHT_PASSES = 10


@dataclass(frozen=True, kw_only=True)
class Past:
    """What became of one script in an older run."""

    status: str
    """Its verdict."""
    time_s: float
    """Its duration."""
    asserted: int
    """How many things it asserted."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the suite."""

    started: str
    """UTC, ISO 8601."""
    commit: str
    """Of the sources; empty where there is no repository."""
    device: str
    """cpu or cuda."""
    fresh: bool
    """Whether every rank started from nothing."""
    jobs: int | None
    """Scripts at once, as asked for."""
    time_s: float
    """Of all."""
    exit_code: int
    """Of the run."""
    scripts: dict[str, Past] = field(default_factory=dict)
    """By name."""

    @classmethod
    def read(cls, line: str) -> "Run":
        """The run that `line` holds; raises ValueError, TypeError or KeyError where it holds none."""
        values: dict[str, Any] = json.loads(line)
        return cls(**{**values, "scripts": {name: Past(**past) for name, past in values["scripts"].items()}})

    def counted(self, status: Status) -> int:
        """Scripts of that status."""
        return sum(past.status == status for past in self.scripts.values())


class History:
    """The runs in a file, oldest first."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.runs: list[Run] = []
        for line in place.read_text(encoding="utf-8", errors="replace").splitlines() if place.exists() else []:
            try:
                self.runs.append(Run.read(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def of(self, name: str, *, device: str, fresh: bool) -> list[Past]:
        """A script's past in runs of one kind: on the same device, with ranks started the same way."""
        alike = [run for run in self.runs if (run.device, run.fresh) == (device, fresh)]
        return [run.scripts[name] for run in alike if name in run.scripts]

    @staticmethod
    def usual_s(past: Sequence[Past]) -> float | None:
        """The median duration of the last passes; None where there are none."""
        passed = [one.time_s for one in past if one.status == Status.PASS]
        return statistics.median(passed[-_USUAL_OF:]) if passed else None

    def is_ready_to_return(self, name: str) -> bool:
        """Whether a quarantined script passed so often in a row that its quarantine can end."""
        last = [run.scripts[name].status for run in self.runs if name in run.scripts][-_STRAIGHT_PASSES:]
        return last == [Status.PASS] * _STRAIGHT_PASSES

    def add(self, run: Run) -> None:
        """Appends to the file, and forgets runs older than the last `KEPT_RUNS`."""
        self.runs.append(run)
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with self.place.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other runs may end at the same time
            file.seek(0)
            lines = file.read().splitlines()  # the last of which may have been cut short
            file.truncate(0)
            file.write(b"".join(line + b"\n" for line in [*lines, json.dumps(asdict(run)).encode()][-KEPT_RUNS:]))


def default_place() -> Path:
    """In the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemo_opt" / "suite.jsonl"


def pasts(outcomes: Sequence[Outcome]) -> dict[str, Past]:
    """What later runs shall know of `outcomes`."""
    return {o.name: Past(status=o.status, time_s=o.time_s, asserted=len(o.assertions)) for o in outcomes}
