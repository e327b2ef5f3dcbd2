"""A run on the terminal: every figure in one table, by bench; on a narrow terminal a few lines for each instead of a table of slivers."""

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nemo_opt.perf import words
from nemo_opt.perf.report import Report, Row, commit

__all__ = ["show"]

_COLUMNS = ("what", "case", "metric", "value", "peer", "limit", "goal", "reached", "verdict")
_NUMBERS = frozenset({"value", "peer", "limit", "goal"})
_STYLES = {
    "REGRESSION": "red",
    "MISSING": "red",
    "IMPROVEMENT": "green",
    "ENV_CHANGED": "yellow",
    "INCONCLUSIVE": "yellow",
    "NO_BASELINE": "dim",
}
_TABLE_WIDTH = 116
"""Characters below which the nine columns fold into slivers; by looking at the suite's own figures."""


def show(report: Report, console: Console | None = None) -> None:
    """Prints every figure, then why each that is not OK is not; the last line is the summary."""
    console = console or Console(width=None if Console().is_terminal else 160)
    record = report.record
    where = f"Performance, run {len(report.runs)} on {record.platform}: {record.started}, {commit(record)}"
    _line(console, where, style="bold")
    rows = sorted(report.rows, key=lambda row: row.names)
    if rows and console.width >= _TABLE_WIDTH:
        console.print(_table(rows))
    elif rows:
        _blocks(console, rows)
    for row in (row for row in report.rows if row.verdict != "OK"):
        told = ", ".join(part for part in (words.change(row), row.reason, row.attribution) if part)
        _line(console, f"{words.verdict(row)}: {row.series}" + (f": {told}" if told else ""), style=_style(row))
    for name in record.failed:
        _line(console, f"benchmark failed: {name}", style="red")
    _line(console, report.summary, style={"good": "green", "undecided": "yellow", "not good": "red"}[report.outcome])


def _table(rows: list[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    for bench, group in groupby(rows, key=lambda row: row.names[0]):
        for number, row in enumerate(group):
            _, case, metric = row.names
            cells = [bench if number == 0 else "", case, metric, *_numbers(row)]
            table.add_row(*(escape(cell) for cell in cells), f"[{_style(row)}]{words.verdict(row)}[/]")
        table.add_section()
    return table


def _numbers(row: Row) -> list[str]:
    """Value, peer, limit, goal, reached."""
    figure = row.figure
    if figure is None:
        return [""] * 5
    peer = " ".join(part for part in (words.peer(figure), figure.peer) if part)
    return [words.value(figure), peer, words.limit(figure), words.goal(figure), words.reached(figure)]


def _blocks(console: Console, rows: list[Row]) -> None:
    for bench, group in groupby(rows, key=lambda row: row.names[0]):
        _line(console, bench, style="bold")
        for row in group:
            _, case, metric = row.names
            value, peer, limit, goal, reached = _numbers(row)
            told = [value, f"peer {peer}" if peer else "", f"limit {limit}" if limit else "", f"goal {goal} {reached}" if goal else ""]
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
