"""A run as one self-contained HTML page: status by script and layout, asserted numbers, times against older runs, losses, logs.

Logs are cut in the middle and drawings are made of what scripts left, so that the page of a whole suite stays near a megabyte.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_opt import pages
from nemo_opt.pages import COLOURS
from nemo_opt.testing.assertions import key_numbers
from nemo_opt.testing.suite.history import Past, Run
from nemo_opt.testing.suite.report import Report, versions
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome, Status

__all__ = ["write"]

_CLASSES: dict[str, str] = {"pass": "good", "fail": "bad", "timeout": "bad", "infrastructure": "bad", "not run": "soft"}
_HEAD_BYTES, _TAIL_BYTES = 8_000, 24_000
_BARS, _BAR_WIDTH, _BAR_HEIGHT = 20, 5, 18
_OLDER_RUNS = 12
_NUMBERS = 8
_LOSSES = ("lm_loss", "loss", "kd_loss", "logits_loss", "intermediate_loss", "validation_loss")
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\t\n\x20-\U0010ffff]")


def write(report: Report, place: Path) -> None:
    """Writes the page."""
    layouts = sorted({outcome.script.layout for outcome in report.outcomes})
    pages.write_page(
        "suite.html.j2",
        place,
        good=report.good,
        summary=report.summary,
        about=_about(report),
        layouts=layouts,
        families=_families(report.outcomes, layouts),
        scripts=[_script(report, outcome) for outcome in report.outcomes],
        left_out=report.left_out,
        ready_to_return=report.ready_to_return,
        runs=[_run(run) for run in [*report.older, report.run][-_OLDER_RUNS:][::-1]],
        versions=versions(),
    )


def _about(report: Report) -> str:
    run, machine = report.run, report.machine
    where = f"{len(machine.gpus)} GPUs" if machine.gpus else f"{machine.cores} cores"
    ranks = "ranks started from nothing" if run.fresh else "ranks forked from one server"
    return " · ".join(part for part in (run.started, run.commit, f"{run.device}, {where}", ranks) if part)


def _families(outcomes: Sequence[Outcome], layouts: Sequence[str]) -> list[tuple[str, list[list[dict[str, str]]]]]:
    """(name without its layout, for each layout its outcomes)."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for outcome in outcomes:
        script = outcome.script
        family = "_".join(part for part in script.name.split("_") if part != script.layout)
        cell = {"name": script.name, "status": str(outcome.status), "css": _css(outcome)}
        found.setdefault(family, {}).setdefault(script.layout, []).append(cell)
    return [(family, [cells.get(layout, []) for layout in layouts]) for family, cells in sorted(found.items())]


def _css(outcome: Outcome) -> str:
    return "soft" if outcome.script.quarantined else _CLASSES[outcome.status]


def _script(report: Report, outcome: Outcome) -> dict[str, Any]:
    name = outcome.name
    return {
        "name": name,
        "script": outcome.script,
        "status": str(outcome.status),
        "css": _css(outcome),
        "reason": outcome.reason,
        "quarantine": _quarantine(outcome.script),
        "time_s": outcome.time_s,
        "usual_s": report.usual_s.get(name),
        "bars": _bars([*report.past.get(name, []), Past(status=outcome.status, time_s=outcome.time_s, asserted=len(outcome.assertions))]),
        "assertions": outcome.assertions,
        "fewer": report.asserts_fewer(outcome),
        "numbers": key_numbers(outcome.assertions, _NUMBERS),
        "log": None if outcome.log is None else _log(Path(outcome.log)),
        "drawings": _drawings(report.metrics / f"{name}.metrics"),
    }


def _quarantine(script: Script) -> str:
    return f"in quarantine until {script.expires}: {script.issue}" if script.quarantined else ""


def _run(run: Run) -> dict[str, Any]:
    counted = {status: run.counted(status) for status in Status}
    words = ", ".join(f"{number} {status}" for status, number in counted.items() if number)
    return {"run": run, "words": words, "css": "good" if run.exit_code == 0 else "bad"}


def _log(place: Path) -> dict[str, Any]:
    """Its beginning and end, as text that a page can hold."""
    content = place.read_bytes()
    left_out = max(0, len(content) - _HEAD_BYTES - _TAIL_BYTES)
    parts = [content[:_HEAD_BYTES], content[-_TAIL_BYTES:]] if left_out else [content]
    texts = [_UNPRINTABLE.sub("", part.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")) for part in parts]
    return {"path": str(place), "texts": texts, "left_out": left_out}


# ---------------------------------------------------------------------------------------------------------------- drawings


def _bars(past: Sequence[Past]) -> str:
    """One bar for each of the last runs of a script: as high as it took long, in the colour of its status."""
    shown = past[-_BARS:]
    longest = max((one.time_s for one in shown), default=0.0) or 1.0
    rectangles = []
    for number, one in enumerate(shown):
        height = max(2.0, _BAR_HEIGHT * one.time_s / longest)
        colour = {"good": "good", "bad": "bad"}.get(_CLASSES.get(one.status, ""), "line")
        x, y, width = (_BARS - len(shown) + number) * _BAR_WIDTH, _BAR_HEIGHT - height, _BAR_WIDTH - 1
        rectangles.append(f'<rect x="{x}" y="{y:.1f}" width="{width}" height="{height:.1f}" fill="var(--{colour})"/>')
    words = f"the last {len(shown)} runs, at most {longest:.1f} s; {sum(one.status == Status.PASS for one in shown)} passed"
    size = f'width="{_BARS * _BAR_WIDTH}" height="{_BAR_HEIGHT}" style="max-width: none"'
    return f'<svg role="img" aria-label="{html.escape(words)}" {size}><title>{html.escape(words)}</title>{"".join(rectangles)}</svg>'


def _drawings(folder: Path) -> list[str]:
    """The losses of each metrics.jsonl that the script left."""
    found = []
    for place in sorted(folder.glob("*.jsonl")):
        lines = _lines(place)
        series: dict[str, list[tuple[int, float]]] = {}
        for name in _LOSSES:
            if len(points := _points(lines, name)) > 1 and points not in series.values():  # of one term, the sum is that term
                series[name] = points
        if series:
            found.append(
                pages.plot(partial(_draw, series), title=f"Losses of {place.stem.removesuffix('_metrics')}", width=5.6, height=2.2)
            )
    return found


def _lines(place: Path) -> list[dict[str, Any]]:
    """The whole lines of a log that may have been cut short."""
    lines = place.read_text(errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _points(lines: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if "step" in line and math.isfinite(line.get(name) or math.nan)]


def _draw(series: dict[str, list[tuple[int, float]]], figure: Any) -> None:
    axes = figure.add_subplot()
    styles = [("main", "-"), ("good", "-"), ("soft", "-"), ("main", "--"), ("good", "--"), ("soft", "--")]
    for (name, points), (colour, style) in zip(series.items(), styles, strict=False):
        axes.plot(*zip(*points, strict=True), color=COLOURS[colour], linestyle=style, label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.legend()
