"""A change against its base: interleaved pairs of runs on one machine, judged by Wilcoxon's signed ranks of the ratios.

Decisions:
- Pairs, since both halves of one share the machine's mood; signed ranks, since one pair that was disturbed must decide nothing.
- It fails only where p < 0.01 and the median ratio is beyond 3 %: with thousands of runs any change is significant, not any matters.
- What is not found must have been findable: where the confidence interval holds both no change and one of 5 %, the verdict is INCONCLUSIVE,
  and as many pairs again are added to the first, never another try.
"""

import math
from collections.abc import Sequence

import numpy as np

from nemo_opt.errors import DataError
from nemo_opt.perf.change_point import Values
from nemo_opt.perf.record import Direction
from nemo_opt.perf.verdict import Finding, Verdict

__all__ = ["MIN_CHANGE", "MIN_PAIRS", "MORE_PAIRS", "RESOLVED", "judge_pairs", "middle", "signed_rank_p"]

MIN_PAIRS = 8
"""Of a verdict that can fail: seven pairs that all agree have p = 0.0078, and a single one that does not takes that above 0.01."""

MAX_P = 0.01
"""One-sided, of the first look."""

MORE_PAIRS, MAX_P_MORE = 16, 0.005
"""Where eight pairs are inconclusive, eight more are measured, and p must be smaller from this number on: with 0.01 at both looks false
alarms were 1.5 % on noise of 7 %, and 0.1 % on noise of 2 %."""

MIN_CHANGE = 0.03
"""Of the median ratio."""

RESOLVED = 0.05
"""A change of this size must be ruled out before it is said that there is none."""

_CONFIDENCE = 0.95


def judge_pairs(base: Sequence[float], head: Sequence[float], *, direction: Direction = "lower") -> Finding:
    """Judges values of interleaved runs of two trees.

    Args:
        base: Of the base, in order.
        head: Of the change, `head[i]` measured beside `base[i]`.
        direction: Which is better.

    Raises:
        DataError: The numbers of values differ, or a value is not a positive number.

    """
    if len(base) != len(head):
        raise DataError(f"{len(base)} runs of the base != {len(head)} of the change: pairs are needed")
    if any(not (math.isfinite(x) and x > 0) for x in [*base, *head]):
        raise DataError(f"ratios need positive numbers, not {[x for x in [*base, *head] if not (math.isfinite(x) and x > 0)][:3]}")
    if len(base) == 0:
        return Finding(verdict=Verdict.NO_BASELINE, reason="no pairs were measured")
    logs = np.log(np.asarray(head, float)) - np.log(np.asarray(base, float))
    middle = float(np.median(logs))
    worse = logs if direction == "lower" else -logs
    p_worse, p_better = signed_rank_p(worse), signed_rank_p(-worse)
    low, high = (math.expm1(x) for x in _interval(logs))
    change = math.expm1(middle)
    told = f"{change:+.1%} (95 % of {low:+.1%} to {high:+.1%}), p = {min(p_worse, p_better):.2g}, {len(base)} pairs"
    verdict = _verdict(float(np.median(worse)), p_worse, p_better, len(base))
    if len(base) < MIN_PAIRS:
        verdict, told = Verdict.INCONCLUSIVE, f"{told}; {MIN_PAIRS} are needed"
    elif verdict is Verdict.OK and max(high, -low / (1 + low)) >= RESOLVED:
        verdict, told = Verdict.INCONCLUSIVE, f"{told}: {RESOLVED:.0%} cannot be ruled out, more pairs are needed"
    return Finding(
        verdict=verdict,
        reason=told,
        change=change,
        p=min(p_worse, p_better),
        baseline=float(np.median(base)),
        value=float(np.median(head)),
        n=len(base),
        unconfirmed=verdict is Verdict.INCONCLUSIVE and len(base) < MORE_PAIRS,
    )


def _verdict(worse: float, p_worse: float, p_better: float, pairs: int) -> Verdict:
    least = math.log1p(MIN_CHANGE)
    max_p = MAX_P if pairs < MORE_PAIRS else MAX_P_MORE
    if p_worse < max_p and worse > least:
        return Verdict.REGRESSION
    if p_better < max_p and worse < -least:
        return Verdict.IMPROVEMENT
    return Verdict.OK


def signed_rank_p(differences: Values) -> float:
    """Wilcoxon's exact p, one-sided, that differences lie above 0; those of exactly 0 are left out, ties share their ranks."""
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    doubled = _doubled_ranks(np.abs(values))
    below = int(sum(rank for rank, value in zip(doubled, values, strict=True) if value < 0))
    return float(_distribution(doubled)[: below + 1].sum())


def _doubled_ranks(sizes: Values) -> list[int]:
    """Twice the ranks, whole numbers also where ties share the mean rank."""
    ordered = np.sort(sizes)
    first, last = np.searchsorted(ordered, sizes, "left"), np.searchsorted(ordered, sizes, "right")
    return [int(a + b + 1) for a, b in zip(first, last, strict=True)]


def _distribution(ranks: Sequence[int]) -> Values:
    """Probability of each sum of the ranks that carry a minus, where every sign is as likely."""
    chances = np.zeros(sum(ranks) + 1)
    chances[0] = 1.0
    for rank in ranks:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[: len(chances) - rank]
        chances = (chances + shifted) / 2
    return chances


def middle(values: Values) -> float:
    """Hodges and Lehmann's estimate (1963), the median of the means of each two: nearly as robust as a median, as exact as a mean."""
    return float(np.median(_means(values)))


def _means(values: Values) -> Values:
    """Of each two values, one and the same included, in order."""
    return np.sort(((values[:, None] + values) / 2)[np.triu_indices(len(values))])


def _interval(logs: Values) -> tuple[float, float]:
    """The interval of Hodges and Lehmann: of the means of two differences, those that signed ranks do not refuse."""
    n = len(logs)
    means = _means(logs)
    chances = _distribution([2 * rank for rank in range(1, n + 1)])[::2].cumsum()
    cut = int(np.searchsorted(chances, (1 - _CONFIDENCE) / 2, "right"))
    # With fewer than six pairs no interval of this confidence is finite.
    return (-math.inf, math.inf) if cut == 0 else (float(means[cut - 1]), float(means[-cut]))
