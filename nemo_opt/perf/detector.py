"""Whether the latest run of a noisy series moved: a jump against the current level, or a change point since the accepted level.

Pure functions of numbers. Decisions:
- A jump is judged by its size, and by its distance from the median in units of the noise (median absolute deviation), so that outliers in
  the history hide nothing. One run that jumps fails nothing: two fresh runs decide, by the median of all three, and where there are none,
  the two runs before it do. Never the best of several.
- The noise is that of the series around its levels: a noisy series needs a larger jump. Where even 10 % would not show, a move of 5 % is
  INCONCLUSIVE and not OK.
- A change point is a matter of the last runs; the distance of the current level from the accepted one remains until somebody accepts it, so
  that nothing turns green by waiting.
- Values are compared as logarithms: +10 % of a time and -9.1 % of a speed are the same.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from nemo_opt.errors import DataError
from nemo_opt.perf.change_point import ChangePoint, Values, change_points
from nemo_opt.perf.noise import MIN_RUNS, RECENT, deviation_of, level_and_noise
from nemo_opt.perf.record import Direction
from nemo_opt.perf.verdict import Finding, Verdict

__all__ = ["FRESH_RUNS", "control_discoveries", "judge_latest"]

MIN_JUMP = 0.05
"""Relative size of a jump that matters."""

JUMP_Z = 2.2
"""In deviations (`nemo_opt.perf.noise`). The false alarms are held down by the median of three, not by this: see `nemo_opt.perf.power`."""

FRESH_RUNS = 2
"""That confirm or refute a jump."""

RESOLVED = 0.10
"""A series in which a jump of this size would not be seen is too noisy to be called OK when it moved."""

LOOK_BACK = 8
"""Runs during which a change point is news; after that the distance from the accepted level counts."""

LEVEL_Z = 4.0
"""Of the distance between the current level and the accepted one, in deviations of such a distance: an alarm that stays needs to be far
beyond. Without it false alarms were 3.3 % of checks on noise of 7 % whose neighbours resemble each other (0.4)."""

MAX_FALSE_DISCOVERIES = 0.05
"""Share of the regressions and improvements of a report that chance may have made (Benjamini and Hochberg)."""


def judge_latest(
    history: Sequence[float],
    values: Sequence[float],
    *,
    direction: Direction = "lower",
    environment_changed: Collection[int] = (),
) -> Finding:
    """Judges the latest run of a segment.

    Args:
        history: Earlier values of the segment, in order, without the judged ones.
        values: The latest value; or three, followed by those of two fresh runs of the same commit.
        direction: Which is better.
        environment_changed: Positions, in history followed by the latest run, at which versions or settings changed.

    Raises:
        DataError: A value is not a positive number, or there are not one or three.

    """
    if len(values) not in (1, 1 + FRESH_RUNS):
        raise DataError(f"{len(values)} values of the latest run; give 1, or {1 + FRESH_RUNS} with the fresh ones")
    past, fresh = _logs(history), _logs(values)
    value = float(_middle(fresh))
    if len(past) < MIN_RUNS:
        told = f"{math.exp(value):.4g}, {len(past)} earlier runs; {MIN_RUNS} are needed"
        return Finding(verdict=Verdict.NO_BASELINE, reason=told, value=math.exp(value), n=len(past))
    jump = _judge_jump(past, fresh, direction, environment_changed)
    drift = _judge_drift(past, value, direction, environment_changed)
    return jump if drift is None or jump.verdict.severity < drift.verdict.severity else drift


def _logs(values: Sequence[float]) -> Values:
    wrong = [x for x in values if not (math.isfinite(x) and x > 0)]
    if wrong:
        raise DataError(f"times and ratios need positive numbers, not {wrong[:3]}: the benchmark is broken, or its kind is `exact`")
    return np.log(np.asarray(values, float))


def _middle(values: Values) -> float:
    return float(np.median(values))


def _verdict(size: float, direction: Direction) -> Verdict:
    return Verdict.REGRESSION if (size > 0) == (direction == "lower") else Verdict.IMPROVEMENT


# The jump --------------------------------------------------------------------------------------------


def _judge_jump(past: Values, fresh: Values, direction: Direction, environment_changed: Collection[int]) -> Finding:
    level, noise = level_and_noise(past)
    n = min(len(past), RECENT)
    value = float(_middle(fresh))
    first = float(fresh[0]) - level
    size, z = value - level, (value - level) / noise
    least = max(math.log1p(MIN_JUMP), JUMP_Z * noise)
    told = f"{math.expm1(size):+.1%} against the median of {n} runs, {abs(z):.1f} times the noise of {noise:.1%}"
    found = Finding(
        verdict=Verdict.OK,
        reason=told,
        change=math.expm1(size),
        p=_p_of(z, len(fresh)),
        z=z,
        baseline=math.exp(level),
        value=math.exp(value),
        n=n,
    )
    if abs(first) < least:
        if abs(size) >= math.log1p(MIN_JUMP) and least > math.log1p(RESOLVED):
            return replace(found, verdict=Verdict.INCONCLUSIVE, reason=f"{told}: less than {math.expm1(least):.0%} does not show here")
        return found
    if len(fresh) > 1:
        if abs(size) < least or size * first < 0:
            return replace(found, reason=f"first {math.expm1(first):+.1%}, with two fresh runs {told}: not confirmed")
        told = f"{told}, confirmed by two fresh runs"
    elif (seen := _seen_before(past, float(fresh[0]))) is not None:
        found, told = seen, f"{seen.reason}, as in the two runs before"
    else:
        told = f"{told}: two fresh runs must confirm it"
        return replace(found, verdict=Verdict.INCONCLUSIVE, reason=told, index=len(past), unconfirmed=True)
    at = len(past) if found.index is None else found.index
    if at in environment_changed:
        return replace(found, verdict=Verdict.ENV_CHANGED, reason=f"{told}; the environment changed in the same step", index=at)
    return replace(found, verdict=_verdict(size, direction), reason=told, index=at)


def _seen_before(past: Values, value: float) -> Finding | None:
    """The jump, if the two runs before the latest are beyond it as well: then they are its confirmation."""
    earlier, recent = past[:-FRESH_RUNS], [*past[-FRESH_RUNS:], value]
    if len(earlier) < MIN_RUNS:
        return None
    level, noise = level_and_noise(earlier)
    least = max(math.log1p(MIN_JUMP), JUMP_Z * noise)
    size = float(np.median(recent)) - level
    if abs(size) < least or (recent[0] - level) * size < 0 or abs(recent[0] - level) < least:
        return None
    n = min(len(earlier), RECENT)
    told = f"{math.expm1(size):+.1%} against the median of {n} runs, {abs(size / noise):.1f} times the noise of {noise:.1%}"
    return Finding(
        verdict=Verdict.OK,
        reason=told,
        change=math.expm1(size),
        p=_p_of(size / noise, len(recent)),
        z=size / noise,
        baseline=math.exp(level),
        value=math.exp(level + size),
        n=n,
        index=len(earlier),
    )


def _p_of(z: float, runs: int) -> float:
    """How often one run, or the median of three, would lie so far out, two-sided: the median's deviation is 0.67 of one run's."""
    return math.erfc(abs(z) / (0.67 if runs > 1 else 1.0) / math.sqrt(2))


# The drift -------------------------------------------------------------------------------------------


def _judge_drift(past: Values, value: float, direction: Direction, environment_changed: Collection[int]) -> Finding | None:
    """The newest change point if it is recent, or else the distance from the accepted level; None if neither is anything."""
    logs = np.append(past, value)
    points = change_points(logs)
    if not points:
        return _judge_creep(logs, direction)
    newest = points[-1]
    if len(logs) - newest.index <= LOOK_BACK:
        return _from_point(logs, points, len(points) - 1, direction, environment_changed)
    accepted, current = float(np.median(logs[: points[0].index])), float(np.median(logs[newest.index :]))
    counted = 1 / points[0].index + 1 / (len(logs) - newest.index)
    deviation = level_and_noise(logs)[1] * math.sqrt(1.57 * counted)
    if abs(current - accepted) < max(math.log1p(MIN_JUMP), LEVEL_Z * deviation):
        return None
    blamed = [i for i, point in enumerate(points) if not _at_environment(point, environment_changed)]
    own = sum(math.log1p(points[i].change) for i in blamed)
    if blamed and own * (current - accepted) > 0 and abs(own) >= math.log1p(MIN_JUMP):
        largest = max(blamed, key=lambda i: abs(points[i].change) * (points[i].change * own > 0))
        verdict, why = _verdict(current - accepted, direction), "nobody has accepted it in accepted.toml"
    else:
        largest = max(range(len(points)), key=lambda i: abs(points[i].change))
        verdict, why = Verdict.ENV_CHANGED, "most of it came with changes of the environment"
    told = f"the level is {math.expm1(current - accepted):+.1%} from the accepted one: {why}"
    return Finding(
        verdict=verdict,
        reason=told,
        change=math.expm1(current - accepted),
        p=points[largest].p,
        baseline=math.exp(accepted),
        value=math.exp(current),
        n=points[0].index,
        index=points[largest].index,
    )


def _judge_creep(logs: Values, direction: Direction) -> Finding | None:
    """The distance of the last runs from the first, where no step is large enough to be a change point; None if it is nothing."""
    if len(logs) < 3 * LOOK_BACK:
        return None
    accepted, current = float(np.median(logs[:LOOK_BACK])), float(np.median(logs[-LOOK_BACK:]))
    size = current - accepted
    runs = np.arange(len(logs))
    around = logs - np.polynomial.Polynomial.fit(runs, logs, 1)(runs)
    deviation = deviation_of(around - np.median(around)) * math.sqrt(2 * 1.57 / LOOK_BACK)
    if abs(size) < max(math.log1p(MIN_JUMP), LEVEL_Z * deviation):
        return None
    return Finding(
        verdict=_verdict(size, direction),
        reason=f"{math.expm1(size):+.1%} from the first {LOOK_BACK} to the last {LOOK_BACK} of {len(logs)} runs, in small steps",
        change=math.expm1(size),
        p=math.erfc(abs(size) / deviation / math.sqrt(2)),
        z=size / deviation,
        baseline=math.exp(accepted),
        value=math.exp(current),
        n=len(logs) - 1,
    )


def _from_point(
    logs: Values, points: Sequence[ChangePoint], which: int, direction: Direction, environment_changed: Collection[int]
) -> Finding:
    """The finding of one change point between its neighbouring levels."""
    point = points[which]
    begin = points[which - 1].index if which else 0
    before = float(np.median(logs[begin : point.index]))
    after = float(np.median(logs[point.index :]))
    told = f"{point.change:+.1%} since {len(logs) - point.index} runs against the {point.index - begin} before, p = {point.p:.2g}"
    blamed = _at_environment(point, environment_changed)
    return Finding(
        verdict=Verdict.ENV_CHANGED if blamed else _verdict(point.change, direction),
        reason=f"{told}{'; the environment changed in the same step' if blamed else ''}",
        change=point.change,
        p=point.p,
        baseline=math.exp(before),
        value=math.exp(after),
        n=point.index - begin,
        index=point.index,
    )


def _at_environment(point: ChangePoint, environment_changed: Collection[int]) -> bool:
    return point.index in environment_changed


# Many series -----------------------------------------------------------------------------------------


def control_discoveries(ps: Sequence[float], *, share: float = MAX_FALSE_DISCOVERIES) -> list[bool]:
    """Which of several p are discoveries, where chance may have made this share of them (Benjamini and Hochberg 1995)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    last = max((rank for rank, i in enumerate(order, start=1) if ps[i] <= share * rank / len(ps)), default=0)
    found = set(order[:last])
    return [i in found for i in range(len(ps))]
