"""How the numbers of a report are written, the same on the page, in Markdown and on the terminal.

Decisions:
- Three digits: no figure of a shared machine repeats better than that. Exact figures are written whole.
- A value is written with as many more digits as it takes not to contradict the word beside it: 0.7504 misses a goal of 0.75.
- What is good or bad is said by a sign and a word; colour only repeats it.
"""

import math

from nemo_opt.perf.record import Figure
from nemo_opt.perf.report import Row
from nemo_opt.perf.verdict import Verdict

__all__ = ["SIGNS", "baseline", "change", "goal", "limit", "noise", "number", "peer", "reached", "spread", "value", "verdict"]

SIGNS = {
    Verdict.REGRESSION: "\N{BALLOT X}",
    "MISSING": "\N{BALLOT X}",
    "ENV_CHANGED": "!",
    "INCONCLUSIVE": "?",
    "IMPROVEMENT": "\N{CHECK MARK}",
    "NO_BASELINE": "\N{EN DASH}",
    "OK": "\N{CHECK MARK}",
}
"""Of each verdict."""

_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}
_UNITS = {"bytes": "B", "byte": "B", "seconds": "s"}


def verdict(row: Row) -> str:
    """Such as `environment changed`."""
    return row.verdict.words


def number(amount: float, unit: str = "", kind: str = "ratio", *, digits: int = 3) -> str:
    """An amount with its unit; seconds and bytes in the size that suits them."""
    if not math.isfinite(amount):
        return str(amount)
    if kind == "exact":
        return f"{_whole(amount)} {unit}".rstrip()
    size, unit = _scale(amount, unit)
    return f"{_rounded(amount / size, digits)} {unit}".rstrip()


def _scale(amount: float, unit: str) -> tuple[float, str]:
    scales = _SCALES.get(_UNITS.get(unit, unit), ((1.0, unit),))
    return next((scale for scale in scales if abs(amount) >= scale[0]), scales[-1] if amount else scales[0])


def _whole(amount: float) -> str:
    return f"{amount:,.0f}" if float(amount).is_integer() else f"{amount:,.6g}"


def _rounded(amount: float, digits: int) -> str:
    if amount == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(amount)))
    return f"{amount:,.{max(0, places)}f}" if places < 8 else f"{amount:.{digits - 1}e}"


def _shown(amount: float, digits: int) -> float:
    """As the reader of its text has it."""
    return float(_rounded(amount, digits).replace(",", ""))


def _given(amount: float, figure: Figure) -> str:
    """A number that a person chose: with all its digits and no more."""
    if not math.isfinite(amount):
        return str(amount)
    scaled = amount / _scale(amount, figure.unit)[0]
    digits = next((digits for digits in range(1, 10) if math.isclose(_shown(scaled, digits), scaled, rel_tol=1e-9)), 9)
    return number(amount, figure.unit, figure.kind, digits=digits)


def value(figure: Figure) -> str:
    """The figure's, with digits enough that it agrees with `reached`."""
    size, _ = _scale(figure.value, figure.unit)
    if figure.goal is None or figure.value == figure.goal:
        return number(figure.value, figure.unit, figure.kind)
    scaled, goal_scaled = figure.value / size, figure.goal / size
    way = math.copysign(1.0, scaled - goal_scaled)
    enough = (digits for digits in range(3, 12) if (_shown(scaled, digits) - goal_scaled) * way > 0)
    return number(figure.value, figure.unit, figure.kind, digits=next(enough, 12))


def spread(figure: Figure) -> str:
    """How far the rounds were apart; empty where that is not known."""
    rounds = len(figure.samples)
    return "" if figure.spread is None else f"\N{PLUS-MINUS SIGN}{100 * figure.spread:.1f} % in {rounds} rounds"


def noise(row: Row) -> str:
    """How far a run may lie from those before it; empty where that is not known."""
    if row.noise is None or row.figure is None:
        return ""
    return "exact" if row.figure.kind == "exact" else f"\N{PLUS-MINUS SIGN}{100 * row.noise:.{0 if row.noise >= 0.1 else 1}f} %"


def peer(figure: Figure) -> str:
    """The peer's value."""
    return "" if figure.peer_value is None else number(figure.peer_value, figure.unit, figure.kind)


def limit(figure: Figure) -> str:
    """What cannot be passed."""
    if figure.limit is None:
        return ""
    given, measured = _given(figure.limit, figure), number(figure.limit, figure.unit, figure.kind)
    return min(given, measured, key=len)  # some are measured


def goal(figure: Figure) -> str:
    """The goal with its direction."""
    if figure.goal is None:
        return ""
    sign = "\N{LESS-THAN OR EQUAL TO}" if figure.direction == "lower" else "\N{GREATER-THAN OR EQUAL TO}"
    return f"{sign} {_given(figure.goal, figure)}"


def reached(figure: Figure) -> str:
    """A sign and a word; empty without a goal."""
    return {None: "", True: "\N{CHECK MARK} reached", False: "\N{BALLOT X} missed"}[figure.reached]


def change(row: Row) -> str:
    """The relative change and, where it was found to be one, which way that is."""
    if row.change is None:
        return ""
    way = {"REGRESSION": " worse", "IMPROVEMENT": " better"}.get(row.verdict, "")
    percent = round(100 * row.change, 1) or 0.0  # not -0.0
    return f"{percent:+.1f} %{way}".replace("-", "\N{MINUS SIGN}", 1)


def baseline(row: Row) -> str:
    """What the change is of; empty without one."""
    if row.baseline is None or row.judged is None:
        return ""
    unit, kind = (row.last.unit, row.last.kind) if row.last else ("", "ratio")
    kind = "ratio" if kind == "exact" and not row.baseline.is_integer() else kind
    return f"of {number(row.baseline, unit, kind)}, {row.judged.n} {'run' if row.judged.n == 1 else 'runs'}"
