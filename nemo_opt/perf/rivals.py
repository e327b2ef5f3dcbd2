"""How other harnesses decide whether a run is slower, so that `power` can put our rule beside them on the same draws.

Decisions:
- Each rule is applied as its harness applies it, with the thresholds that its documentation or users choose, lower being better.
- A rule sees one draw: logarithms of the history, of the latest run and of its fresh ones, and rounds of the last two runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_opt.perf.change_point import Values
from nemo_opt.perf.detector import judge_latest
from nemo_opt.perf.verdict import Verdict

__all__ = ["RULES", "Draw", "Rule"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a rule may look at; all values are logarithms."""

    history: Values
    """Earlier runs, in order."""
    latest: float
    """The judged run."""
    fresh: Values
    """Two more of the same sources."""
    rounds: tuple[Values, Values]
    """Of the run before, and of the judged one."""


type Rule = Callable[[Draw], bool | None]
"""Whether the latest run fails; None where the rule cannot decide."""


def _history(draw: Draw) -> bool | None:
    past, values = np.exp(draw.history).tolist(), np.exp([draw.latest, *draw.fresh]).tolist()
    finding = judge_latest(past, values[:1])
    if finding.unconfirmed:
        finding = judge_latest(past, values)
    return None if finding.verdict is Verdict.INCONCLUSIVE else finding.verdict.fails


def _previous(draw: Draw) -> bool:
    return bool(draw.latest - draw.history[-1] > math.log(1.05))


def _median(draw: Draw) -> bool:
    return bool(draw.latest - np.median(draw.history) > math.log(1.05))


def _mann_whitney(draw: Draw) -> bool:
    """By the normal approximation, one-sided p < 0.01."""
    before, after = draw.rounds
    n, m = len(before), len(after)
    wins = float((after[:, None] > before).sum())
    z = (wins - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return bool(z > 2.326 and np.median(after) - np.median(before) > math.log(1.03))


def _conbench(draw: Draw) -> bool:
    values = np.exp(draw.history[-100:])
    return bool(math.exp(draw.latest) - values.mean() > 5 * values.std(ddof=1))


RULES: dict[str, Rule] = {
    "history: jump confirmed by 2 fresh runs, or change point": _history,
    "previous run, median +5 % (pytest-benchmark)": _previous,
    "median of the history +5 %": _median,
    "Mann-Whitney on rounds, +3 %": _mann_whitney,
    "z > 5 of mean and deviation (Conbench)": _conbench,
}
"""Ours first."""
