"""A run on the terminal: every figure in one table, by bench; on a narrow terminal a few lines for each instead of a table of slivers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nemo_opt.perf import words
from nemo_opt.perf.history import by_series
from nemo_opt.perf.record import Record
from nemo_opt.perf.report import Report, Row, commit
from nemo_opt.perf.verdict import Verdict

if TYPE_CHECKING:
    from nemo_opt.perf.compare import Comparison

__all__ = ["show", "show_comparison", "show_history"]

_COLUMNS = ("what", "case", "metric", "value", "noise", "peer", "limit", "goal", "reached", "verdict")
_NUMBERS = frozenset({"value", "noise", "peer", "limit", "goal"})
_STYLES = {
    Verdict.REGRESSION: "red",
    Verdict.MISSING: "red",
    Verdict.IMPROVEMENT: "green",
    Verdict.ENV_CHANGED: "yellow",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.NO_BASELINE: "dim",
}
_MOST_NEW = 5
_TABLE_WIDTH = 116
"""Characters below which the ten columns fold into slivers; by looking at the suite's own figures."""


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 160)


def show(report: Report, console: Console | None = None, *, judged: bool = True) -> None:
    """Prints every figure, then why each that is not OK is not; the last line is the summary. Unless `judged`, the figures alone."""
    console = console or _console()
    record = report.record
    where = f"Performance, run {len(report.runs)} on {record.platform}: {record.started}, {commit(record)}"
    _line(console, where, style="bold")
    rows = sorted(report.rows, key=lambda row: row.names)
    if rows and console.width >= _TABLE_WIDTH:
        console.print(_table(rows, judged=judged))
    elif rows:
        _blocks(console, rows)
    if judged:
        _tell(console, [row for row in report.rows if row.verdict != Verdict.OK])
    for name in record.failed:
        _line(console, f"benchmark failed: {name}", style="red")
    if judged:
        _line(console, report.summary, style={"good": "green", "undecided": "yellow", "not good": "red"}[report.outcome])
    else:
        _line(console, "{} figures; {} of {} goals reached".format(len(rows), *report.goals))


def _tell(console: Console, rows: list[Row]) -> None:
    """Why each has its verdict; of a first run none has a baseline, which is told once."""
    new = [row for row in rows if row.verdict == Verdict.NO_BASELINE]
    if len(new) > _MOST_NEW:
        rows = [row for row in rows if row.verdict != Verdict.NO_BASELINE]
        _line(console, f"no baseline: {len(new)} figures, which need more earlier runs; {new[0].series}: {new[0].reason}", style="dim")
    for row in rows:
        told = ", ".join(part for part in (words.change(row), row.reason, row.attribution) if part)
        _line(console, f"{words.verdict(row)}: {row.series}" + (f": {told}" if told else ""), style=_style(row))


def show_history(records: Sequence[Record], only: str, console: Console | None = None) -> int:
    """Prints the series whose name contains `only`, and returns how many."""
    series = {name: points for name, points in sorted(by_series(records).items()) if only.lower() in name.lower()}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("series", "runs", "first", "last", "median", "apart"):
        table.add_column(column, overflow="fold", justify="left" if column == "series" else "right")
    for name, points in series.items():
        figures = [point.figure for point in points]
        middle = statistics.median(figure.value for figure in figures)
        apart = statistics.median(abs(figure.value - middle) for figure in figures) / abs(middle) if middle else 0.0
        told = [words.number(x, figures[-1].unit, figures[-1].kind) for x in (figures[0].value, figures[-1].value, middle)]
        table.add_row(escape(name), str(len(points)), *told, f"\N{PLUS-MINUS SIGN}{apart:.1%}" if len(points) > 2 else "")
    if series:
        (console or _console()).print(table)
    return len(series)


def show_comparison(found: Comparison, console: Console | None = None) -> None:
    """Prints every series of both trees."""
    console = console or _console()
    base, head = found.base[-1], found.head[-1]
    _line(
        console, f"{commit(base)} {base.subject} -> {commit(head)} {head.subject}: {len(found.head)} pairs on {head.platform}", style="bold"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("series", "base", "change", "verdict", "by what"):
        table.add_column(column, overflow="fold", justify="right" if column == "base" else "left")
    figures = {**base.by_series(), **head.by_series()}
    for one in found.judgements:
        figure = figures[one.series]
        before = "" if one.baseline is None else words.number(one.baseline, figure.unit, figure.kind)
        after = "" if one.value is None else words.number(one.value, figure.unit, figure.kind)
        table.add_row(escape(one.series), before, after, f"[{_STYLES.get(one.verdict, 'none')}]{one.verdict}[/]", escape(one.reason))
    console.print(table)
    for name in found.other_results:
        _line(console, f"{name}: computes something else than in the base; whether that is right, tests/unit says", style="yellow")


def _table(rows: list[Row], *, judged: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS if judged else _COLUMNS[:-1]:
        table.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    for bench, group in groupby(rows, key=lambda row: row.names[0]):
        for number, row in enumerate(group):
            _, case, metric = row.names
            cells = [bench if number == 0 else "", case, metric, *_numbers(row)]
            table.add_row(*(escape(cell) for cell in cells), *([f"[{_style(row)}]{words.verdict(row)}[/]"] if judged else []))
        table.add_section()
    return table


def _numbers(row: Row) -> list[str]:
    """Value, noise, peer, limit, goal, reached."""
    figure = row.figure
    if figure is None:
        return [""] * 6
    peer = " ".join(part for part in (words.peer(figure), figure.peer) if part)
    return [words.value(figure), words.noise(row), peer, words.limit(figure), words.goal(figure), words.reached(figure)]


def _blocks(console: Console, rows: list[Row]) -> None:
    for bench, group in groupby(rows, key=lambda row: row.names[0]):
        _line(console, bench, style="bold")
        for row in group:
            _, case, metric = row.names
            value, noise, peer, limit, goal, reached = _numbers(row)
            told = [
                f"{value} {noise}".rstrip(),
                f"peer {peer}" if peer else "",
                f"limit {limit}" if limit else "",
                f"goal {goal} {reached}" if goal else "",
            ]
            _line(console, f"{case}, {metric}", indent=2)
            _line(console, "; ".join(part for part in (words.verdict(row), *told) if part), style=_style(row), indent=4)


def _line(console: Console, text: str, *, style: str = "none", indent: int = 0) -> None:
    """One line for a program to read; or, indented, a paragraph whose further lines are indented as the first."""
    if indent:
        console.print(Padding(Text(text), (0, 0, 0, indent), style=style, expand=False))
    else:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _style(row: Row) -> str:
    return _STYLES.get(row.verdict, "none")
