"""Levels that a person has accepted: `accepted.toml`, a part of the sources and so of a change's review.

    [[accepted]]
    series = "distillation step/TP1PP2/time of ModelOpt's"
    since = "20261129T162544Z"
    reason = "the loss now checks for NaN"
    author = "A. Person"

Decisions:
- An entry begins a new segment of its series: older points are no longer compared.
- `series` is a name or a pattern in which only `*` and `?` mean something: names of series hold brackets.
- `since` is a commit that was measured, or a time. A change cannot name its own commit: it names the time of the run that it accepts.
"""

import fnmatch
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nemo_opt.errors import DataError
from nemo_opt.perf.history import Point
from nemo_opt.perf.record import Record

__all__ = ["Accepted", "read_accepted", "segment", "unplaced"]

_TIME = re.compile(r"\d{8}T\d{6}Z")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """An entry."""

    series: str
    """Name or pattern."""
    since: str
    """First run of the new level: its commit, seven digits at least, or its start as `20261129T162544Z`."""
    reason: str
    """Why the level is right."""
    author: str
    """Who says so."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{name} = {value!r}: a text in quotes is needed")
        if not _TIME.fullmatch(self.since) and not _COMMIT.fullmatch(self.since):
            raise DataError(f"since = {self.since!r}: neither a commit of 7 to 40 hexadecimal digits nor a start like 20261129T162544Z")

    def covers(self, series: str) -> bool:
        """Whether the entry is about a series."""
        return series == self.series or fnmatch.fnmatchcase(series, self.series.replace("[", "[[]"))

    def start(self, records: Sequence[Record]) -> str | None:
        """The time from which on points count; None where the commit was never measured."""
        if _TIME.fullmatch(self.since):
            return self.since
        return min((record.started for record in records if record.commit.startswith(self.since)), default=None)


def read_accepted(place: Path) -> tuple[Accepted, ...]:
    """The entries of a file; none where there is no file.

    Raises:
        DataError: The file is not TOML, or an entry lacks something, or has something unknown.

    """
    if not place.exists():
        return ()
    try:
        content = tomllib.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: not TOML: {error}") from error
    unknown = sorted(content.keys() - {"accepted"})
    entries = content.get("accepted", [])
    if unknown or not isinstance(entries, list):
        raise DataError(f"{place}: only a list [[accepted]] may stand here, not {', '.join(unknown) or 'another accepted'}")
    return tuple(_entry(f"{place}: entry {i}", values) for i, values in enumerate(entries, start=1))


def _entry(where: str, values: Any) -> Accepted:
    if not isinstance(values, dict):
        raise DataError(f"{where}: {values!r} is not a table")
    names = {field.name for field in fields(Accepted)}
    missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
    if missing or unknown:
        raise DataError(f"{where}: missing: {', '.join(missing) or 'nothing'}; unknown: {', '.join(unknown) or 'nothing'}")
    try:
        return Accepted(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def segment(series: str, points: Sequence[Point], accepted: Sequence[Accepted], records: Sequence[Record]) -> tuple[Point, ...]:
    """The points that still count: those since the newest entry about the series.

    Args:
        series: Its name.
        points: Of the series, in order.
        accepted: All entries.
        records: Among which commits are looked up, those without a point of the series included.

    """
    starts = [start for entry in accepted if entry.covers(series) and (start := entry.start(records))]
    return tuple(point for point in points if not starts or point.record.started >= max(starts))


def unplaced(accepted: Sequence[Accepted], records: Sequence[Record]) -> list[Accepted]:
    """Entries without effect, since their commit was never measured on this platform; worth a line in a report."""
    return [entry for entry in accepted if entry.start(records) is None]
