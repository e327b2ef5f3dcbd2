"""The history of one series as a small SVG: its values over the runs, and what happened to it on the way.

A run is as far from the next as any other, whether or not it measured the series; the line is faint across runs without it. Marks
differ in form and not only in colour: a band from where a change began, a dotted line where the environment changed, a triangle where an
accepted level starts, a dashed line for what the value is compared with. Colours are the page's CSS variables.
"""

import html
from collections.abc import Callable, Sequence

from nemo_opt.perf import words
from nemo_opt.perf.report import Row
from nemo_opt.perf.verdict import Verdict

__all__ = ["LEGEND", "sparkline"]

_WIDTH, _HEIGHT, _LABELS = 150.0, 44.0, 68.0
"""Of the line, in CSS pixels; the labels stand to its right."""
_LABEL_CHARACTERS = 9
_MARGIN = 6.0
_MANY = 60
"""Runs from which a thinner line keeps neighbours apart."""
_COLOURS = {Verdict.REGRESSION: "bad", Verdict.MISSING: "bad", Verdict.IMPROVEMENT: "good"}

type _Place = Callable[[float], float]


def sparkline(row: Row, runs: int) -> str:
    """The drawing of `row` over runs 1 to `runs`; empty where there is no value at all."""
    if not row.points:
        return ""
    values = [point.value for point in row.points]
    shown = [*values, row.baseline] if row.baseline is not None else values
    low, high = min(shown), max(shown)

    def x(run: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * ((run - 1) / (runs - 1) if runs > 1 else 0.5)

    def y(value: float) -> float:
        return _MARGIN + (_HEIGHT - 2 * _MARGIN) * ((high - value) / (high - low) if high > low else 0.5)

    colour = f"var(--{_COLOURS.get(row.verdict, 'main')})"
    stroke = f'fill="none" stroke="{colour}" stroke-width="{1.5 if runs <= _MANY else 0.8}"'
    across = "L".join(f"{x(point.run):.1f} {y(point.value):.1f}" for point in row.points)
    parts = [*_marks(row, x, y, colour), f'<path class="across" d="M{across}" {stroke} opacity=".35"/>']
    parts += [f'<path class="line" d="{_path(row, x, y)}" {stroke}/>']
    last = row.points[-1]
    parts += [f'<circle cx="{x(last.run):.1f}" cy="{y(last.value):.1f}" r="2.6" fill="{colour}"/>', *_labels(row, values)]
    label = html.escape(_label(row, values, runs))
    size = f'width="{_WIDTH + _LABELS:g}" height="{_HEIGHT:g}" viewBox="0 0 {_WIDTH + _LABELS:g} {_HEIGHT:g}"'
    return f'<svg class="spark" role="img" aria-label="{label}" {size}><title>{label}</title>{"".join(parts)}</svg>'


def _path(row: Row, x: _Place, y: _Place) -> str:
    """A line through runs that follow each other; a lone one is a line of no length, which round ends make a dot."""
    steps: list[str] = []
    for number, point in enumerate(row.points):
        follows = number > 0 and row.points[number - 1].run == point.run - 1
        steps.append(f"{'L' if follows else 'M'}{x(point.run):.1f} {y(point.value):.1f}")
        alone = not follows and (number + 1 == len(row.points) or row.points[number + 1].run != point.run + 1)
        steps += ["h.1"] if alone else []
    return "".join(steps)


def _marks(row: Row, x: _Place, y: _Place, colour: str) -> list[str]:
    half = (x(2) - x(1)) / 2 if len(row.points) > 1 else 0.0
    found = []
    if row.changed is not None:
        start = x(row.changed) - half
        found.append(
            f'<rect class="changed" x="{start:.1f}" y="0" width="{_WIDTH - start:.1f}" height="{_HEIGHT:g}" fill="{colour}" opacity=".18"/>'
        )
        found.append(f'<path d="M{start:.1f} 0V{_HEIGHT:g}" stroke="{colour}" stroke-width="1.5"/>')
    for run, _ in row.environments:
        place = x(run) - half
        found.append(f'<path class="environment" d="M{place:.1f} 0V{_HEIGHT:g}" stroke="var(--text)" stroke-dasharray="1 3"/>')
    for run in row.levels:
        place = x(run)
        found.append(f'<path class="level" d="M{place - 4:.1f} 0h8l-4 6z" fill="var(--text)"/>')
    if row.baseline is not None:
        found.append(f'<path class="baseline" d="M0 {y(row.baseline):.1f}H{_WIDTH:g}" stroke="var(--soft)" stroke-dasharray="5 3"/>')
    return found


def _labels(row: Row, values: Sequence[float]) -> list[str]:
    """The largest value above, the smallest below; of equal ones a single label."""
    high, low = (_short(_number(row, amount)) for amount in (max(values), min(values)))
    places = [(high, _HEIGHT / 2 + 4)] if high == low else [(high, 12.0), (low, _HEIGHT - 4)]
    return [
        f'<text x="{_WIDTH + 6:g}" y="{place:g}" font-size="11" fill="var(--soft)">{html.escape(text)}</text>' for text, place in places
    ]


def _short(text: str) -> str:
    """Without its unit where both would not fit; the table has it."""
    return text if len(text) <= _LABEL_CHARACTERS else text.split()[0]


def _number(row: Row, amount: float) -> str:
    return words.number(amount, row.last.unit, row.last.kind) if row.last else words.number(amount)


def _label(row: Row, values: Sequence[float], runs: int) -> str:
    number = len(values)
    told = [f"{row.series}: {number} {'value' if number == 1 else 'values'} in {runs} {'run' if runs == 1 else 'runs'}"]
    told += [f"from {_number(row, min(values))} to {_number(row, max(values))}, last {_number(row, values[-1])}"]
    told += [f"compared with {_number(row, row.baseline)}"] if row.baseline is not None else []
    told += [f"changed at run {row.changed}"] if row.changed is not None else []
    told += [f"environment changed at run {run}: {what}" for run, what in row.environments]
    told += [f"accepted level from run {run}" for run in row.levels]
    return "; ".join(told)


def _sample(drawing: str) -> str:
    return f'<svg class="spark" aria-hidden="true" width="18" height="14" viewBox="0 0 18 14">{drawing}</svg>'


LEGEND = (
    (
        _sample(
            '<rect x="5" width="13" height="14" fill="var(--bad)" opacity=".25"/><path d="M5 0V14" stroke="var(--bad)" stroke-width="1.5"/>'
        ),
        "from where a change began",
    ),
    (_sample('<path d="M9 0V14" stroke="var(--text)" stroke-dasharray="1 3"/>'), "the environment changed"),
    (_sample('<path d="M4 3h10l-5 8z" fill="var(--text)"/>'), "an accepted level starts"),
    (_sample('<path d="M0 7H18" stroke="var(--soft)" stroke-dasharray="5 3"/>'), "what the value is compared with"),
)
"""(drawing, meaning) of each mark."""
