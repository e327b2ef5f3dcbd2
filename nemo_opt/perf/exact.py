"""Figures without noise: counts, which must be equal, and memory, which must be equal within one per cent.

Decisions:
- Compared with the level that was accepted, the beginning of the segment, not with the last run: small steps do not add up unseen.
- A count that differs fails whichever way it went: fewer quantizers may be a gain or a fault, and only a person can say. What is meant is
  written into `accepted.toml`. Memory that is lower is an improvement.
"""

import statistics
from collections.abc import Callable, Collection, Sequence

from nemo_opt.perf.record import Direction
from nemo_opt.perf.verdict import Finding, Verdict

__all__ = ["MEMORY_TOL_REL", "judge_exact", "judge_memory"]

MEMORY_TOL_REL = 0.01
"""Peak memory on the CPU repeats to the page on the same versions; one per cent leaves room for a library's buffers."""

_FIRST = 5
"""Runs at the beginning of a segment that state its memory."""

_REMEDY = "accept it in accepted.toml if it is meant"


def judge_exact(history: Sequence[float], value: float, *, environment_changed: Collection[int] = ()) -> Finding:
    """Judges a count against the first of its segment.

    Args:
        history: Earlier values of the segment, in order.
        value: The latest.
        environment_changed: Positions, in history followed by the latest, at which versions or settings changed.

    """
    if not history:
        return Finding(verdict=Verdict.NO_BASELINE, reason=f"{_told(value)}, measured for the first time", value=value)
    baseline = history[0]
    if value == baseline:
        return Finding(
            verdict=Verdict.OK, reason=f"{_told(value)} as before", change=0.0, baseline=baseline, value=value, n=len(history), index=None
        )
    index = _first([*history, value], lambda x: x == value)
    blamed = index in environment_changed
    why = "which changed with the environment" if blamed else f"a count must be the same; {_REMEDY}"
    return Finding(
        verdict=Verdict.ENV_CHANGED if blamed else Verdict.REGRESSION,
        reason=f"{_told(value)} != {_told(baseline)}: {why}",
        change=value / baseline - 1 if baseline else None,
        baseline=baseline,
        value=value,
        n=len(history),
        index=index,
    )


def judge_memory(
    history: Sequence[float], value: float, *, direction: Direction = "lower", environment_changed: Collection[int] = ()
) -> Finding:
    """Judges bytes against the median of the first runs of their segment; for the arguments see `judge_exact`."""
    if not history:
        return Finding(verdict=Verdict.NO_BASELINE, reason=f"{_told(value)}, measured for the first time", value=value)
    baseline = statistics.median(history[:_FIRST])

    def moved(x: float) -> bool:
        return abs(x - baseline) > MEMORY_TOL_REL * abs(baseline)

    change = value / baseline - 1 if baseline else None
    told = f"{_told(value)} against {_told(baseline)}{f' ({change:+.1%})' if change is not None else ''}"
    if not moved(value):
        verdict, index = Verdict.OK, None
        told += f", within {MEMORY_TOL_REL:.0%}"
    else:
        index = _first([*history, value], moved)
        if index in environment_changed:
            verdict, told = Verdict.ENV_CHANGED, f"{told}, which changed with the environment"
        elif (value < baseline) == (direction == "lower"):
            verdict, told = Verdict.IMPROVEMENT, f"{told}; accept the new level in accepted.toml"
        else:
            verdict, told = Verdict.REGRESSION, f"{told}, beyond {MEMORY_TOL_REL:.0%}; {_REMEDY}"
    return Finding(verdict=verdict, reason=told, change=change, baseline=baseline, value=value, n=len(history), index=index)


def _told(amount: float) -> str:
    """With all its digits: one more quantizer among a million is what this is about."""
    return f"{amount:,.0f}" if amount.is_integer() else f"{amount:g}"


def _first(values: Sequence[float], holds: Callable[[float], bool]) -> int:
    """Where the last unbroken stretch begins in which `holds` is true."""
    index = len(values) - 1
    while index and holds(values[index - 1]):
        index -= 1
    return index
