"""Where the level of a series changed: E-divisive splits in windows, a t-test for each, and merging of the weakest (Hunter, Apache Otava).

Decisions:
- Deterministic: a split is tested by Student's t instead of permutations, as Hunter does. The variance is pooled, not Welch's: three points
  after a change have two degrees of freedom of their own, and with Welch's a step of five standard deviations has p = 0.009.
- Neighbouring runs resemble each other (a busy hour), so the t-test allows for their correlation.
- Splits are searched with a tenfold p, then the weakest are merged away until all that are left are significant and large enough: a split
  that looks weak alone may be strong once a neighbour is gone.
- A level has at least three points: one run that was disturbed is no level.
- A lone outlier is drawn in before anything is tested (`calmed`): it would widen every deviation and hide small steps, and two of them
  among three points look like a level.
- A level is where its median is, a change is as large as the medians are apart: outliers do not make it larger.
- Values are logarithms, so that a change and its reverse weigh the same and units do not matter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_LEVEL", "ChangePoint", "Values", "calmed", "change_points"]

type Values = NDArray[np.float64]
"""Of a series, as logarithms."""

MIN_LEVEL = 3
"""Points of a level."""

WINDOW = 50
"""Points that are searched at once, by steps of a half: with more, a short level drowns between long ones (Hunter's number)."""

MAX_P = 0.0002
"""Of a change point. Hunter's 0.001 gave false alarms in 1.1 % of checks on noise of 7 %, this 0.7 %: the best of many splits is tested."""

MIN_CHANGE = 0.03
"""Relative, of a change point: the noise of a median of thirty runs on a shared machine is 0.5 %, so this is the first that matters."""


_MAX_LIKENESS = 0.8
"""Of the correlation of neighbours that the test allows for: beyond it a series wanders, and thirty points say nothing of its level."""

_MIN_REACH = 0.005
"""Of the filter: values that repeat exactly are not drawn in to each other."""


@dataclass(frozen=True, kw_only=True)
class ChangePoint:
    """A position at which a new level begins."""

    index: int
    """Of the first point of the new level."""
    change: float
    """Relative, of the new median against the old."""
    p: float
    """Of Student's t-test between the neighbouring levels."""


def change_points(logs: Values, *, max_p: float = MAX_P, min_change: float = MIN_CHANGE, window: int = WINDOW) -> list[ChangePoint]:
    """The change points of a series.

    Args:
        logs: Logarithms of the values, in order.
        max_p: Of every change point that is returned.
        min_change: Relative size of every change point that is returned.
        window: Points searched at once.

    """
    calm = calmed(logs)
    places: set[int] = set()
    start, end = 0, 0
    while end < len(logs):
        end = min(start + window, len(logs))
        found = _split(calm, start, end, 10 * max_p)
        places |= set(found)
        start = max([start + window // 2, *found])
    return _merged(logs, calm, _settled(calm, sorted(places)), max_p=max_p, min_size=math.log1p(min_change))


def calmed(logs: Values) -> Values:
    """The series with each value drawn in to three deviations from the median of its neighbourhood, seven points (Hampel's filter)."""
    if len(logs) < 2 * MIN_LEVEL:
        return logs
    padded = np.pad(logs, MIN_LEVEL, constant_values=np.nan)
    middle = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * MIN_LEVEL + 1), axis=1)
    reach = max(3 * 1.4826 * float(np.median(np.abs(logs - middle))), _MIN_REACH)
    return np.clip(logs, middle - reach, middle + reach)


def _split(logs: Values, start: int, end: int, max_p: float) -> list[int]:
    """Positions of significant splits between `start` and `end`, found by halving."""
    index = _best_split(logs[start:end])
    if index is None or _test(logs[start : start + index], logs[start + index : end]) > max_p:
        return []
    middle = start + index
    return [*_split(logs, start, middle, max_p), middle, *_split(logs, middle, end, max_p)]


def _best_split(logs: Values) -> int | None:
    """The position that maximizes the energy distance between both sides (Matteson and James 2013, equation 7 with alpha = 1)."""
    n = len(logs)
    if n < 2 * MIN_LEVEL:
        return None
    sums = np.abs(logs[:, None] - logs).cumsum(0).cumsum(1)
    left = np.arange(MIN_LEVEL, n - MIN_LEVEL + 1)
    right = n - left
    within_left = np.diagonal(sums)[left - 1]
    between = sums[left - 1, -1] - within_left
    within_right = sums[-1, -1] - within_left - 2 * between
    energy = 2 * between / (left * right) - within_left / (left * (left - 1)) - within_right / (right * (right - 1))
    return int(left[np.argmax(energy * left * right / n)])


def _test(left: Values, right: Values) -> float:
    """The p of Student's t-test, two-sided, for neighbours that resemble each other; 0 for two constants that differ."""
    from scipy.special import stdtr

    n, m = len(left), len(right)
    one, other = left - left.mean(), right - right.mean()
    squares = float(one @ one + other @ other)
    difference = abs(float(right.mean() - left.mean()))
    # What is left of rounding when constants are averaged is no noise.
    if squares < 1e-20:
        return 0.0 if difference > 1e-9 else 1.0
    likeness = (float(one[1:] @ one[:-1] + other[1:] @ other[:-1]) / squares) + 2 / (n + m)
    likeness = min(max(likeness, 0.0), _MAX_LIKENESS)
    error = math.sqrt(squares / (n + m - 2) * (1 / n + 1 / m) * (1 + likeness) / (1 - likeness))
    return float(2 * stdtr(n + m - 2, -difference / error))


def _settled(calm: Values, places: Sequence[int]) -> list[int]:
    """The positions, each moved by a few runs to where squares around both means are least: the energy distance is not sharp there."""
    edges = [0, *places, len(calm)]
    for which in range(1, len(edges) - 1):
        begin, place, end = edges[which - 1 : which + 2]
        near = range(max(begin + MIN_LEVEL, place - MIN_LEVEL), min(end - MIN_LEVEL, place + MIN_LEVEL) + 1)
        squares = {i: _squares(calm[begin:i]) + _squares(calm[i:end]) for i in near}
        edges[which] = min(squares, key=squares.__getitem__, default=place)
    return edges[1:-1]


def _squares(calm: Values) -> float:
    return float(calm.var()) * len(calm)


def _merged(logs: Values, calm: Values, places: Sequence[int], *, max_p: float, min_size: float) -> list[ChangePoint]:
    """The change points that are left when the weakest has been taken away again and again, until none is weak."""
    places = list(places)
    while places:
        edges = [0, *places, len(logs)]
        stretches = [slice(begin, end) for begin, end in pairwise(edges)]
        neighbours = list(pairwise(stretches))
        ps = [_test(calm[left], calm[right]) for left, right in neighbours]
        sizes = [float(np.median(logs[right]) - np.median(logs[left])) for left, right in neighbours]
        weakest = max(range(len(places)), key=ps.__getitem__)
        if ps[weakest] <= max_p:
            weakest = min(range(len(places)), key=lambda i: abs(sizes[i]))
            if abs(sizes[weakest]) >= min_size:
                return [ChangePoint(index=i, change=math.expm1(s), p=p) for i, s, p in zip(places, sizes, ps, strict=True)]
        del places[weakest]
    return []
