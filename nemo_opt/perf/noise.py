"""How far runs of the same sources lie apart: what is stated beside a figure, and what a jump is measured against.

Decisions:
- Robust: by the median of the sizes of deviations, which a few disturbed runs do not move.
- Around the levels: a change that the series has gone through is not its noise.
- Of few runs it is enlarged, so that three deviations are as rare as of a normal deviate whatever the number of runs.
- Before there are enough runs it is reckoned from the rounds of the run, which share the luck of their process: that luck is added.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from nemo_opt.errors import DataError
from nemo_opt.perf.change_point import Values, change_points
from nemo_opt.perf.exact import MEMORY_TOL_REL
from nemo_opt.perf.record import Figure

__all__ = ["MIN_RUNS", "RECENT", "deviation_of", "is_within", "level_and_noise", "stated"]

MIN_RUNS = 6
"""That tell a noise: the deviation of fewer says nothing (the 99.7 % point of z of five points is 28)."""

_MIN_ROUNDS = 3
"""That tell anything."""

RECENT = 30
"""Runs that tell level and noise."""

_MIN_DEVIATION = 0.002
"""Relative floor: figures are written with finite digits, and a constant history must not make a last digit a jump."""

_DEVIATIONS = 3.0
"""That are stated: one run of 370 lies farther out by chance."""

_MEDIAN = math.pi / 2
"""Variance of the median of n normal deviates, times n."""

_LUCK = {"ratio": 0.04, "time": 0.10}
"""Relative deviation of runs whose rounds all agree: ratios of freshly started processes of the same sources deviated by 1.3 to 4.4 %
(benchmarks/noise), the times of one of them by 7 to 15 % in a busy hour."""


def stated(figure: Figure, past: Sequence[float]) -> float | None:
    """How far a run of the same sources may lie from the level of the runs before it, as a share; None where nothing tells it.

    Args:
        figure: Of the run. Counts have none, memory has its tolerance.
        past: Values of the runs before it, in order.

    """
    if figure.kind == "exact":
        return 0.0
    if figure.kind == "memory":
        return MEMORY_TOL_REL
    if len(past) >= MIN_RUNS:
        return math.expm1(_DEVIATIONS * level_and_noise(np.log(np.asarray(past, float)))[1])
    if len(figure.samples) < _MIN_ROUNDS or min(figure.samples) <= 0:
        return None
    of_run = math.hypot(_deviation_of_median(np.log(np.asarray(figure.samples, float))), figure.luck or _LUCK[figure.kind])
    of_level = math.sqrt(_MEDIAN / len(past)) if past else 0.0
    return math.expm1(_DEVIATIONS * of_run * math.hypot(1.0, of_level))


def is_within(figure: Figure, past: Sequence[float]) -> bool:
    """Whether the run's value is as near as `stated` says to the level of those before it, of which there is at least one.

    Raises:
        DataError: Nothing tells the noise.

    """
    noise = stated(figure, past)
    if noise is None:
        raise DataError(f"{figure.series}: no noise is known")
    if figure.kind in ("exact", "memory"):
        return abs(figure.value - statistics.median(past)) <= noise * abs(statistics.median(past))
    logs = np.log(np.asarray(past, float))
    level = level_and_noise(logs)[0] if len(past) >= MIN_RUNS else float(np.median(logs))
    return abs(math.log(figure.value) - level) <= math.log1p(noise)


def level_and_noise(past: Values) -> tuple[float, float]:
    """The median of the current level, and the deviation of a run around the levels of the last runs; of logarithms."""
    edges = [0, *(point.index for point in change_points(past)), len(past)]
    levels = [past[begin:end] for begin, end in pairwise(edges)]
    current = levels[-1][-RECENT:]
    around = np.concatenate([level - np.median(level) for level in levels])[-RECENT:]
    # The median of a few points is itself uncertain; that of thirty is in `deviation_of`.
    uncertain = math.sqrt((1 + _MEDIAN / len(current)) / (1 + _MEDIAN / RECENT))
    return float(np.median(current)), deviation_of(around) * max(uncertain, 1.0)


def _deviation_of_median(rounds: Values) -> float:
    """Of a run's value, from its rounds.

    Of few by their standard deviation, since two of three that agree by chance make their median deviation nothing: of 277 figures of
    four recorded runs three lay outside what that stated, by 3.1 to 5.9 deviations.
    """
    of_one = 1.4826 * np.median(np.abs(rounds - np.median(rounds))) if len(rounds) >= MIN_RUNS else np.std(rounds, ddof=1)
    return math.sqrt(_MEDIAN / len(rounds)) * float(of_one)


def deviation_of(deviations: Values) -> float:
    """The standard deviation by the median of the sizes, enlarged for few points.

    The factor makes z = 3 as rare as of a normal deviate whatever the number of points. It was fitted to 400,000 draws each of normal
    noise: the 99.7 % points of z without it are 12.96, 6.92, 5.38, 4.48 and 3.89 for 6, 10, 15, 20 and 30 points.
    """
    few = 1 + 7.7 / (len(deviations) - 4.3)
    return max(1.4826 * float(np.median(np.abs(deviations))) * few, _MIN_DEVIATION)
