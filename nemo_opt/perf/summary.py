"""A run for CI: in Markdown, the summary that is shown beside a change, and as JSON, for programs."""

import json
import math
import re
from pathlib import Path
from typing import Any

from nemo_opt.perf import words
from nemo_opt.perf.report import Report, Row, commit

__all__ = ["SCHEMA", "write_json", "write_markdown"]

SCHEMA = 1
"""Of the JSON file; counts changes of its form."""

_COLUMNS = ("verdict", "what", "case", "metric", "value", "noise", "peer", "limit", "goal", "reached", "change")
_NUMBERS = frozenset({"value", "noise", "peer", "limit", "goal", "change"})
_SPECIAL = re.compile(r"([\\`*_\[\]#|~$@])")


def write_markdown(report: Report, path: Path) -> None:
    """Writes the summary."""
    record = report.record
    rules = ["--:" if column in _NUMBERS else ":--" for column in _COLUMNS]
    lines = ["# Performance", "", f"**{report.outcome.capitalize()}:** {_escape(report.summary)}", ""]
    lines += [f"- Benchmark failed, its figures are missing: {_escape(name)}" for name in record.failed]
    lines += [""] if record.failed else []
    lines += [_line(_COLUMNS), _line(rules), *(_line(_cells(row)) for row in report.rows), ""] if report.rows else []
    told = [row for row in report.rows if row.verdict != "OK"]
    lines += [f"- **{_escape(row.series)}**: {_escape('; '.join(part for part in (row.reason, row.attribution) if part))}" for row in told]
    lines += [""] if told else []
    lines += [_escape(_about(report)), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    verdict = f"{words.SIGNS[row.verdict]} {words.verdict(row)}"
    cells = [verdict, *row.names]
    figure = row.figure
    if figure is None:
        cells += [""] * 6
    else:
        peer = f"{words.peer(figure)} {figure.peer}".strip()
        cells += [words.value(figure), words.noise(row), peer, words.limit(figure), words.goal(figure), words.reached(figure)]
    return [_escape(cell) for cell in (*cells, words.change(row))]


def _escape(text: str) -> str:
    """Text that neither Markdown nor HTML reads as anything else, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", text)


def _about(report: Report) -> str:
    record = report.record
    short = "the short set" if record.short else "the full set"
    load = f"load {record.load[0]:.1f} before and {record.load[1]:.1f} after"
    versions = ", ".join(f"{name} {version}" for name, version in record.environment.items())
    ran = f"{short} in {record.time_s:.0f} s"
    parts = (f"Run {len(report.runs)} on {record.platform}", record.started, commit(record), ran, load, versions)
    return " · ".join(part for part in parts if part)


def write_json(report: Report, path: Path) -> None:
    """Writes this run's rows for programs; a number that is not finite is null."""
    record, (reached, goals) = report.record, report.goals
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "good": report.good,
        "outcome": report.outcome,
        "summary": report.summary,
        "counts": report.counts,
    }
    values |= {"goals": {"reached": reached, "of": goals}, "run": len(report.runs), "failed": list(record.failed)}
    values |= {name: getattr(record, name) for name in ("started", "commit", "dirty", "subject", "platform", "short", "time_s", "run_id")}
    values |= {"environment": dict(record.environment), "load": list(record.load), "rows": [_json(row) for row in report.rows]}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _json(row: Row) -> dict[str, Any]:
    bench, case, metric = row.names
    values: dict[str, Any] = {"series": row.series, "bench": bench, "case": case, "metric": metric, "verdict": row.verdict}
    for name in ("value", "unit", "kind", "direction", "peer", "peer_value", "limit", "goal", "reached", "spread"):
        value = getattr(row.figure, name, None)
        values[name] = _finite(value) if isinstance(value, float) else value
    values |= {
        "noise": row.noise,
        "repeats": row.repeats,
        "change": row.change,
        "baseline": row.baseline,
        "n": row.judged.n if row.judged else 0,
        "reason": row.reason,
    }
    values |= {"changed_at_run": row.changed, "attribution": row.attribution, "level_starts": list(row.levels)}
    return values | {"history": [{"run": point.run, "commit": point.record.commit, "value": point.value} for point in row.points]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
