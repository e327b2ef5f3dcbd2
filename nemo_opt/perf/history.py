"""The records of one platform in order, and the points of each series in them.

Decisions:
- A file that cannot be read is an error that names it, with all others of its kind: a history with holes would be judged as if it had none.
- Order is that of time: the history is of runs on one machine, not of commits.
- A fact of the environment that one of two records does not know is not a change; an empty one that is filled is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.errors import DataError
from nemo_opt.perf.record import Figure, Record, read
from nemo_opt.perf.verdict import Step

__all__ = ["Point", "by_series", "environment_changes", "in_order", "read_history", "step"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A figure of a series, with the run it is from."""

    record: Record
    """The run."""
    figure: Figure
    """The figure."""

    @property
    def value(self) -> float:
        """The figure's."""
        return self.figure.value


def read_history(folder: Path) -> tuple[Record, ...]:
    """The records in the folder of one platform, in order; none for an empty folder.

    Raises:
        DataError: There is no such folder, files are no records of this schema, or they are of several platforms.

    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it is made with the first run of the benchmarks on this platform")
    records, wrong = [], []
    for place in sorted(folder.glob("*.json")):
        try:
            records.append(read(place))
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(f"{len(wrong)} of {len(wrong) + len(records)} files cannot be read; mend or remove them:\n" + "\n".join(wrong))
    platforms = sorted({record.platform for record in records})
    if len(platforms) > 1:
        raise DataError(f"{folder}: records of {len(platforms)} platforms, which cannot be compared: {', '.join(platforms)}")
    return in_order(records)


def in_order(records: Sequence[Record]) -> tuple[Record, ...]:
    """Sorted by time; of the same second by name."""
    return tuple(sorted(records, key=lambda record: record.name))


def by_series(records: Sequence[Record]) -> dict[str, tuple[Point, ...]]:
    """The points of every series, in the order of the records."""
    found: dict[str, list[Point]] = {}
    for record in records:
        for figure in record.figures:
            found.setdefault(figure.series, []).append(Point(record=record, figure=figure))
    return {series: tuple(points) for series, points in found.items()}


def step(before: Record, after: Record) -> Step:
    """What changed between two runs, with what else changed in the environment."""
    known = [name for name in after.environment if name in before.environment]
    pairs = {name: (before.environment[name], after.environment[name]) for name in known}
    return Step(before=before, after=after, environment={name: pair for name, pair in pairs.items() if pair[0] != pair[1]})


def environment_changes(records: Sequence[Record]) -> frozenset[int]:
    """Positions of records whose environment is not that of the record before."""
    return frozenset(i for i in range(1, len(records)) if step(records[i - 1], records[i]).environment)
