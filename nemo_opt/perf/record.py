"""What a run of the benchmarks measured: figures, each beside its peer, its limit and its goal, with all that may explain them.

Decisions:
- A run is one immutable JSON file, so that two branches never edit the same file.
- The sample is the run: rounds within one process share its luck (memory layout, neighbours on the machine), so a figure's `value` is one
  number and its `samples` only say how far the rounds were apart.
- A series is the figures of one name over runs; its name has no number that may change, such as a time.
"""

import json
import math
import os
import statistics
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_opt.errors import DataError

__all__ = ["SCHEMA", "Direction", "Figure", "Kind", "Record", "read", "write"]

SCHEMA = 1
"""Of the files; a file of another schema is refused."""

type Kind = Literal["exact", "ratio", "time", "memory"]
"""exact: counts and bytes on disk, the same in each run. ratio: of two times of one run. time: seconds, or tokens a second. memory: bytes
or inputs."""

type Direction = Literal["lower", "higher"]
"""Which is better."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a run."""

    bench: str
    """What was measured, such as `distillation step`."""
    case: str
    """Of which size and layout, such as `TP1PP2, 4 microbatches`."""
    metric: str
    """Which number of it, such as `time of ModelOpt's`."""
    value: float
    """The run's value; for repeated rounds their median."""
    unit: str = ""
    """Of the value; empty for ratios and counts."""
    kind: Kind = "ratio"
    """How far it may be trusted."""
    direction: Direction = "lower"
    """Which is better."""
    samples: tuple[float, ...] = ()
    """The rounds, in order."""
    peer: str = ""
    """What it is measured against, such as `ModelOpt's LogitsKLLoss`."""
    peer_value: float | None = None
    """The peer's, in the same unit."""
    limit: float | None = None
    """What no implementation can pass."""
    goal: float | None = None
    """What this project wants."""
    luck: float | None = None
    """Relative deviation of runs beyond that of their rounds, where it is known to be more than usual (`nemo_opt.perf.noise`)."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise DataError(f"{self.series}: a figure of {self.value}: its benchmark is broken")
        if self.kind in ("ratio", "time") and self.value <= 0:
            raise DataError(f"{self.series}: a {self.kind} of {self.value} cannot be compared: times are positive")
        if any("/" in name or not name.strip() for name in (self.bench, self.case, self.metric)):
            raise DataError(f"{self.series}: bench, case and metric need words, without a slash")

    @property
    def series(self) -> str:
        """The name under which runs are compared."""
        return f"{self.bench}/{self.case}/{self.metric}"

    @property
    def reached(self) -> bool | None:
        """Whether the goal is; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.direction == "lower" else self.value >= self.goal

    @property
    def spread(self) -> float | None:
        """Median absolute deviation of the rounds over their median; None for fewer than three."""
        if len(self.samples) < 3:
            return None
        middle = statistics.median(self.samples)
        return statistics.median(abs(x - middle) for x in self.samples) / abs(middle) if middle else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of the benchmarks."""

    started: str
    """UTC, as `20261129T162544Z`."""
    commit: str
    """Of the sources, forty hexadecimal digits; empty where there is no repository."""
    platform: str
    """Key of the machine, from facts that do not jitter (`nemo_opt.perf.platform`)."""
    figures: tuple[Figure, ...]
    """Each series once."""
    dirty: bool = False
    """Whether the sources differ from the commit."""
    subject: str = ""
    """The commit's first line."""
    short: bool = True
    """Whether only the short set ran."""
    failed: tuple[str, ...] = ()
    """Benchmarks that failed, whose figures are therefore missing."""
    time_s: float = 0.0
    """Of the whole run."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and settings that explain a change: torch, megatron-core, nvidia-modelopt, python, kernel, driver, threads."""
    load: tuple[float, float] = (0.0, 0.0)
    """Load average of one minute before and after."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Makes the file's name unique."""
    schema: int = SCHEMA
    """Of this form."""

    def __post_init__(self) -> None:
        names = [figure.series for figure in self.figures]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"measured twice in one run: {', '.join(twice)}")

    @property
    def name(self) -> str:
        """Of its file; names sort by time."""
        return f"{self.started}-{self.commit[:7] or 'nocommit'}-{self.run_id}.json"

    def by_series(self) -> dict[str, Figure]:
        """The figures by their names."""
        return {figure.series: figure for figure in self.figures}


def write(record: Record, folder: Path) -> Path:
    """Writes `record` into `folder/<platform>/`, whole or not at all, and returns the file; one that is there is never changed."""
    place = folder / record.platform / record.name
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        raise DataError(f"{place} exists: a record is never changed")
    part = place.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    part.replace(place)
    return place


def read(place: Path) -> Record:
    """The record in a file; raises DataError that names the file where there is none of this schema."""
    try:
        values: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if values.get("schema") != SCHEMA:
            raise DataError(f"{place}: schema {values.get('schema')} != {SCHEMA}: written by another version of nemo_opt")
        figures = tuple(Figure(**{**figure, "samples": tuple(figure["samples"])}) for figure in values["figures"])
        load = values["load"]
        return Record(**{**values, "figures": figures, "failed": tuple(values["failed"]), "load": (load[0], load[1])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: not a record of a run of the benchmarks: {error}") from error
