"""A run as one self-contained HTML page: verdicts by severity with their history, the ratios of each bench over the runs, what ran where.

The page is whole without matplotlib; with it, each ratio also has a larger drawing beside its peer, its limit and its goal.
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from nemo_opt import pages
from nemo_opt.pages import COLOURS
from nemo_opt.perf import words
from nemo_opt.perf.record import Record
from nemo_opt.perf.report import Report, Row, commit, differences
from nemo_opt.perf.sparkline import LEGEND, sparkline
from nemo_opt.perf.verdict import Verdict

__all__ = ["write_html"]

_CLASSES = {Verdict.REGRESSION: "bad", Verdict.MISSING: "bad", Verdict.IMPROVEMENT: "good", Verdict.NO_BASELINE: "soft", Verdict.OK: "good"}
_OUTCOMES = {"good": ("good", "\N{CHECK MARK} Good"), "undecided": ("", "! Undecided"), "not good": ("bad", "\N{BALLOT X} Not good")}
"""(class, words)"""
_OLDER_RUNS = 30
"""Rows of the table of runs."""
_WIDTH, _HEIGHT = 4.0, 2.0
"""Inches of a drawing: it fits a phone's 358 pixels nearly unshrunk, and three fit beside each other on a desk."""

_TITLE_CHARACTERS = 54


def write_html(report: Report, path: Path) -> None:
    """Writes the page."""
    record = report.record
    reached, goals = report.goals
    pages.write_page(
        "performance.html.j2",
        path,
        sign=_OUTCOMES[report.outcome],
        summary=report.summary,
        about=_about(report),
        failed=record.failed,
        rows=[_row(row, len(report.runs)) for row in report.rows],
        legend=LEGEND,
        reached=reached,
        goals=goals,
        missed=[row for row in report.rows if row.figure is not None and row.figure.reached is False],
        words=words,
        benches=_benches(report),
        environment=_environment(report),
        load=record.load,
        runs=_runs(report)[-_OLDER_RUNS:][::-1],
        older=max(0, len(report.runs) - _OLDER_RUNS),
    )


def _about(report: Report) -> str:
    record = report.record
    short = "the short set" if record.short else "the full set"
    parts = (
        f"run {len(report.runs)}",
        record.started,
        commit(record),
        record.subject,
        record.platform,
        f"{short} in {record.time_s:.0f} s",
    )
    return " · ".join(part for part in parts if part)


def _row(row: Row, runs: int) -> dict[str, Any]:
    bench, case, metric = row.names
    figure = row.figure
    return {
        "css": _CLASSES.get(row.verdict, ""),
        "verdict": f"{words.SIGNS[row.verdict]}\N{NO-BREAK SPACE}{words.verdict(row)}",
        "bench": bench,
        "case": case,
        "metric": metric,
        "value": "" if figure is None else _firm(words.value(figure)),
        "noise": _firm(words.noise(row)),
        "spread": "" if figure is None else words.spread(figure),
        "peer": "" if figure is None else _firm(words.peer(figure)),
        "peer_name": "" if figure is None else figure.peer,
        "limit": "" if figure is None else _firm(words.limit(figure)),
        "goal": "" if figure is None else _firm(words.goal(figure)),
        "reached": "" if figure is None else words.reached(figure),
        "reached_css": "" if figure is None else {True: "good", False: "bad", None: ""}[figure.reached],
        "change": _firm(words.change(row)),
        "change_css": {Verdict.REGRESSION: "bad", Verdict.IMPROVEMENT: "good"}.get(row.verdict, ""),
        "baseline": words.baseline(row),
        "reason": "" if row.verdict == Verdict.OK else row.reason,
        "attribution": row.attribution,
        "spark": sparkline(row, runs),
    }


def _firm(text: str) -> str:
    """That no line breaks between a number and its unit."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _environment(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, what it was in the run before where it differs)."""
    now = report.record.environment
    before = report.runs[-2].environment if len(report.runs) > 1 else now
    told = [(name, value, before.get(name, value)) for name, value in now.items()]
    return [(name, value or "none", "" if was == value else was or "none") for name, value, was in told]


def _runs(report: Report) -> list[dict[str, Any]]:
    pairs: Iterable[tuple[Record | None, Record]] = zip((None, *report.runs[:-1]), report.runs, strict=True)
    return [
        {
            "number": number,
            "record": run,
            "commit": commit(run),
            "changes": ", ".join(differences(before, run)) if before else "",
            "failed": ", ".join(run.failed),
        }
        for number, (before, run) in enumerate(pairs, start=1)
    ]


# ---------------------------------------------------------------------------------------------------------------- drawings


def _benches(report: Report) -> list[tuple[str, list[str]]]:
    """(bench, a drawing for each of its ratios that has a history), by name; empty where matplotlib is not installed."""
    drawn = [row for row in report.rows if row.last is not None and row.last.kind == "ratio" and len(row.points) > 1]
    if not pages.can_plot():
        return []
    by_bench = groupby(sorted(drawn, key=lambda row: row.names), key=lambda row: row.names[0])
    return [(bench, [_drawing(row, len(report.runs)) for row in rows]) for bench, rows in by_bench]


def _drawing(row: Row, runs: int) -> str:
    title = f"{row.series} over {runs} runs"
    return pages.plot(partial(_draw, row, runs), title=title, width=_WIDTH, height=_HEIGHT)


def _draw(row: Row, runs: int, figure: Any) -> None:
    _, case, metric = row.names
    axes = figure.add_subplot()
    axes.set_title(_title(case, metric), loc="left", fontsize=8.5)
    colour = COLOURS[{"bad": "bad", "good": "good"}.get(_CLASSES.get(row.verdict, ""), "main") if row.changed else "main"]
    if row.changed is not None:
        axes.axvspan(row.changed - 0.5, runs + 0.5, color=colour, alpha=0.15, linewidth=0)
    for run, _ in row.environments:
        axes.axvline(run - 0.5, color=COLOURS["text"], linewidth=0.8, linestyle=(0, (1, 3)))
    runs_of, values = [point.run for point in row.points], [point.value for point in row.points]
    axes.plot(runs_of, values, color=colour, linewidth=1.2, marker="o", markersize=2.5 if runs <= 60 else 0)
    for run in row.levels:
        axes.plot([run], [1.0], transform=axes.get_xaxis_transform(), marker="v", color=COLOURS["text"], clip_on=False)
    for name, amount, style in _lines(row):
        axes.axhline(amount, color=COLOURS["soft"], linewidth=0.9, linestyle=style)
        axes.annotate(name, (1.01, amount), xycoords=axes.get_yaxis_transform(), fontsize=8, color=COLOURS["soft"], va="center")
    axes.set_xlim(0.5, runs + 0.5)
    axes.set_xlabel("run", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _lines(row: Row) -> list[tuple[str, float, Any]]:
    """(name, height, style) of the peer, the limit and the goal; equal ones share a line."""
    if row.last is None:
        return []
    found: dict[float, list[str]] = {}
    for name, amount in (("goal", row.last.goal), ("limit", row.last.limit), ("peer", row.last.peer_value)):
        if amount is not None and math.isfinite(amount):
            found.setdefault(amount, []).append(name)
    styles = {"goal": "--", "limit": ":", "peer": "-."}
    return [(", ".join(names), amount, styles[names[0]]) for amount, names in found.items()]


def _title(*names: str) -> str:
    """In lines that fit a drawing, without what matplotlib takes for mathematics."""
    return "\n".join(line for name in names for line in wrap(name, _TITLE_CHARACTERS)).replace("$", r"\$")
