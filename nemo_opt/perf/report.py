"""All that a reader is told of a run: each figure beside its verdict and its history, whatever form it is then written in.

Decisions:
- Nothing is left out: a judged series that the run lacks has a row, and so has a figure that nobody judged.
- Runs are numbered from 1, the oldest; a change is told with the two commits around it and what changed in the environment between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from nemo_opt.errors import DataError
from nemo_opt.perf.accepted import Accepted
from nemo_opt.perf.history import step
from nemo_opt.perf.noise import is_within, stated
from nemo_opt.perf.record import Figure, Record
from nemo_opt.perf.verdict import Judgement, Step, Verdict

__all__ = ["Point", "Report", "Row", "commit", "differences"]

_DECIDED = frozenset({Verdict.OK, Verdict.IMPROVEMENT})
_WITH_SIZE = frozenset({Verdict.REGRESSION, Verdict.IMPROVEMENT})


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value of a series."""

    run: int
    """From 1."""
    value: float
    """Of its figure."""
    record: Record
    """The run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A series and what is known of it."""

    series: str
    """As of `Figure.series`."""
    figure: Figure | None
    """Of this run; None where it is missing."""
    last: Figure | None
    """The newest that there is, for its unit and its goal."""
    verdict: Verdict
    """NO_BASELINE where nobody judged it."""
    judged: Judgement | None
    """None where nobody judged it."""
    points: tuple[Point, ...]
    """Of all runs, oldest first, this one at the end."""
    changed: int | None
    """The run where the change began."""
    attribution: str
    """What lies between that run and the one before it; empty without a change."""
    environments: tuple[tuple[int, str], ...]
    """(run, what differs from the run before it in the series)."""
    levels: tuple[int, ...]
    """Runs at which an accepted level starts."""

    @property
    def names(self) -> tuple[str, str, str]:
        """Bench, case and metric."""
        bench, case, metric = (*self.series.split("/"), "", "")[:3]
        return bench, case, metric

    @property
    def change(self) -> float | None:
        """The judgement's, where it is a number."""
        return None if self.judged is None else _finite(self.judged.change)

    @property
    def baseline(self) -> float | None:
        """The judgement's, where it is a number."""
        return None if self.judged is None else _finite(self.judged.baseline)

    @cached_property
    def noise(self) -> float | None:
        """How far this run may lie from the level of those before it, as a share; None where that is not known."""
        return None if self.figure is None else stated(self.figure, self._past)

    @cached_property
    def repeats(self) -> bool | None:
        """Whether it lies so near; None where that is not known."""
        if self.figure is None or self.noise is None or not self._past:
            return None
        return is_within(self.figure, self._past)

    @property
    def _past(self) -> list[float]:
        """Values of the runs before this one, since the newest accepted level."""
        since = max(self.levels, default=0)
        return [point.value for point in self.points[:-1] if point.run >= since]

    @property
    def reason(self) -> str:
        """The judgement's."""
        return "nobody judged it" if self.judged is None else self.judged.reason


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, older ones, and what was decided."""

    record: Record
    """The run."""
    older: Sequence[Record] = ()
    """Of the same platform; the run itself and what is not older is left out, as the judge does."""
    judgements: Sequence[Judgement] = ()
    """At most one for each series."""
    levels: Sequence[Accepted] = ()
    """Accepted ones."""

    def __post_init__(self) -> None:
        if foreign := sorted({one.platform for one in self.older} - {self.record.platform}):
            raise DataError(f"a run of {self.record.platform} beside those of {', '.join(foreign)}: give the runs of one platform")
        names = [one.series for one in self.judgements]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"judged twice: {', '.join(twice)}")

    @cached_property
    def runs(self) -> tuple[Record, ...]:
        """All, oldest first, this one at the end."""
        return (*sorted((one for one in self.older if one.name < self.record.name), key=lambda one: one.name), self.record)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Worst first; of regressions and improvements the largest first."""
        judged = {one.series: one for one in self.judgements}
        figures = [run.by_series() for run in self.runs]
        rows = [self._row(series, figures, judged.get(series)) for series in dict.fromkeys([*judged, *figures[-1]])]
        return tuple(sorted(rows, key=_order))

    def _row(self, series: str, figures: Sequence[Mapping[str, Figure]], judged: Judgement | None) -> Row:
        found = [(number, of_run[series]) for number, of_run in enumerate(figures, start=1) if series in of_run]
        points = tuple(Point(run=number, value=figure.value, record=self.runs[number - 1]) for number, figure in found)
        at = None if judged is None else judged.at
        changed = None if at is None else self._number(at.after)
        starts = [level.start(self.runs) for level in self.levels if level.covers(series)]
        started = [next((point.run for point in points if start and point.record.started >= start), None) for start in starts]
        steps = [(now.run, ", ".join(differences(before.record, now.record))) for before, now in pairwise(points)]
        return Row(
            series=series,
            figure=figures[-1].get(series),
            last=found[-1][1] if found else None,
            verdict=Verdict.NO_BASELINE if judged is None else judged.verdict,
            judged=judged,
            points=points,
            changed=changed,
            attribution="" if at is None else _attribution(at, changed),
            environments=tuple((number, words) for number, words in steps if words),
            levels=tuple(sorted({number for number in started if number is not None})),
        )

    def _number(self, run: Record) -> int | None:
        return next((number for number, one in enumerate(self.runs, start=1) if one.name == run.name), None)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many rows have each verdict, worst first; only those that occur."""
        verdicts = [row.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in Verdict if verdict in verdicts}

    @property
    def goals(self) -> tuple[int, int]:
        """(reached, all) among this run's figures."""
        told = [figure.reached for figure in self.record.figures if figure.reached is not None]
        return sum(told), len(told)

    @property
    def repeated(self) -> tuple[int, int]:
        """(within their stated noise, all whose noise is known from earlier runs)."""
        told = [row.repeats for row in self.rows if row.repeats is not None]
        return sum(told), len(told)

    @property
    def good(self) -> bool:
        """Whether there are figures, none regressed or is missing, and no benchmark failed."""
        return bool(self.rows) and not any(verdict.fails for verdict in self.counts) and not self.record.failed

    @property
    def outcome(self) -> Literal["good", "undecided", "not good"]:
        """In a word; undecided where a figure has no verdict that could be a pass."""
        if not self.good:
            return "not good"
        return "good" if self.counts.keys() <= _DECIDED else "undecided"

    @property
    def summary(self) -> str:
        """One line."""
        told = ", ".join(_counted(number, verdict) for verdict, number in self.counts.items())
        reached, goals = self.goals
        failed = len(self.record.failed)
        parts = [f"{len(self.rows)} {'figure' if len(self.rows) == 1 else 'figures'}: {told}" if told else "no figures"]
        parts += [f"{reached} of {goals} goals reached"] if goals else []
        parts += ["{} of {} within their stated noise".format(*self.repeated)] if self.repeated[1] else []
        parts += [f"{failed} {'benchmark' if failed == 1 else 'benchmarks'} failed"] if failed else []
        return "; ".join(parts)


def differences(before: Record, after: Record) -> list[str]:
    """What changed in the environment, such as `torch 2.10 -> 2.11`; what one of the two runs does not know is no change."""
    return [f"{name} {old or 'none'} -> {new or 'none'}" for name, (old, new) in step(before, after).environment.items()]


def commit(record: Record) -> str:
    """Seven digits, and a plus where the sources differ from the commit."""
    return (record.commit[:7] or "no commit") + ("+" if record.dirty else "")


def _attribution(at: Step, changed: int | None) -> str:
    before, after = at.before, at.after
    where = f"change at run {changed}" if changed is not None else f"change at the run of {after.started}, which is not among these"
    same = before.commit == after.commit and not before.dirty and not after.dirty
    commits = f"both runs are of {commit(after)}" if same else f"{commit(before)}..{commit(after)}"
    environment = ", ".join(differences(before, after))
    return f"{where}: {commits}" + (f", {environment} in the same step" if environment else "")


def _counted(number: int, verdict: Verdict) -> str:
    plural = "s" if number > 1 and verdict in _WITH_SIZE else ""
    return f"{number} {verdict.words}{plural}"


def _order(row: Row) -> tuple[int, float, str]:
    size = abs(row.change or 0.0) if row.verdict in _WITH_SIZE else 0.0
    return row.verdict.severity, -size, row.series


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
