"""A run on the terminal: a line for each script that starts and ends, then one table with the numbers that each asserted."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_opt.testing.assertions import key_numbers
from nemo_opt.testing.suite.report import Report
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome, Status

__all__ = ["Progress", "show", "show_matrix"]

_COLOURS = {
    Status.PASS: "green",
    Status.FAIL: "red",
    Status.TIMEOUT: "red",
    Status.INFRASTRUCTURE: "magenta",
    Status.NOT_RUN: "yellow",
}
_TAIL_LINES = 25


class Progress:
    """Prints what happens. A line is one write: scripts start and end in several threads."""

    def __init__(self, total: int, usual_s: dict[str, float]) -> None:
        self._total, self._done, self._usual_s = total, 0, usual_s

    def started(self, script: Script) -> None:
        """A script starts."""
        _print(f"        starts  {script.name} {self._usually(script.name) or f'(at most {script.timeout_s} s)'}")

    def ended(self, outcome: Outcome) -> None:
        """A script has ended, or could not run; the end of its log is shown where it did not pass."""
        self._done += 1
        words = [f"[{self._done:2}/{self._total}] {outcome.status:<7} {outcome.name}"]
        if outcome.exit_code is not None or outcome.status is Status.TIMEOUT:
            words.append(f"{outcome.time_s:.0f} s {self._usually(outcome.name)}".strip())
        words += [f"{len(outcome.assertions)} asserted"] if outcome.assertions else []
        words += [outcome.reason] if outcome.reason else []
        tail = "" if outcome.status is Status.PASS else _tail(outcome)
        _print(", ".join(words) + tail)

    def _usually(self, name: str) -> str:
        return f"(usually {self._usual_s[name]:.0f} s)" if name in self._usual_s else ""


def _print(text: str) -> None:
    print(text, flush=True)


def _tail(outcome: Outcome) -> str:
    if outcome.log is None:
        return ""
    lines = Path(outcome.log).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return "".join(f"\n    | {line}" for line in lines)


def show(report: Report) -> None:
    """Prints the table and what else a reader must know; the last line says how long the whole suite took."""
    console = _console()
    table = _table("Functional scripts", "script", "status", "time", "usual", "asserted", "reason and log")
    for outcome in report.outcomes:
        table.add_row(*_cells(report, outcome))
    console.print(table)
    for script in report.left_out:
        console.print(f"in quarantine until {script.expires}, not run: {script.name}, {script.issue}", style="yellow", highlight=False)
    for name in report.ready_to_return:
        console.print(f"ready to return from quarantine: {name} passed ten times in a row", style="green", highlight=False)
    console.print(report.summary, style="green" if report.good else "red", highlight=False, soft_wrap=True)


def _cells(report: Report, outcome: Outcome) -> list[str]:
    script, usual_s = outcome.script, report.usual_s.get(outcome.name)
    quarantine = f"in quarantine until {script.expires}: {script.issue}" if script.quarantined else ""
    where = "" if outcome.status is Status.PASS else outcome.log or ""
    return [
        outcome.name,
        f"[{_COLOURS[outcome.status]}]{outcome.status}[/]",
        f"{outcome.time_s:.0f} s" if outcome.time_s else "",
        "" if usual_s is None else f"{usual_s:.0f} s",
        escape(asserted_words(report, outcome)),
        escape(": ".join(part for part in (quarantine, outcome.reason, where) if part)),
    ]


def asserted_words(report: Report, outcome: Outcome) -> str:
    """How many things a script asserted, and a few of its numbers."""
    if not outcome.assertions:
        return ""
    fewer = report.asserts_fewer(outcome)
    count = f"{len(outcome.assertions)}{f' ({fewer} before)' if fewer else ''}"
    return "  ".join([count, *(f"{name} {number}" for name, number in key_numbers(outcome.assertions).items())])


def show_matrix(scripts: list[Script]) -> None:
    """Prints what there is to run."""
    table = _table("Functional scripts", "script", "layout", "ranks", "timeout", "device", "needs", "memory", "owner", "quarantine")
    for s in scripts:
        memory = f"{s.memory_gib:g} GiB" if s.memory_gib else ""
        quarantine = f"until {s.expires}: {s.issue}" if s.quarantined else ""
        needs = ", ".join(s.needs)
        table.add_row(s.name, s.layout, str(s.ranks), f"{s.timeout_s} s", s.device, needs, memory, s.owner, escape(quarantine))
    _console().print(table)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 160)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("time", "usual", "ranks") else "left")
    return table
