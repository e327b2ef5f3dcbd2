"""Contenders measured side by side: in one process, in turns, in an order that changes, so that drift and neighbours meet all alike.

None runs twice in a row, since it would find its own data in the caches; so two take turns in one order.

The number that counts is `ratios`: each turn's own, whose median does not care for a turn that something else has disturbed.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["interleave", "ratios"]

type Times = dict[str, list[float]]


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    together: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of each contender in each round.

    Args:
        contenders: What to run, by name.
        rounds: How often each runs.
        warmup: Rounds before, which do not count.
        together: Called at both ends before the clock is read: waits for the device and for other ranks; a time is the slowest rank's.
        clock: `time.process_time` where other processes shall not count; ranks that wait in a loop count then as if they worked.

    """
    names = list(contenders)
    times_s: Times = {name: [] for name in names}
    was_enabled = gc.isenabled()
    try:
        for turn in range(warmup + rounds):
            shift = turn % len(names) if len(names) > 2 else 0
            for name in names[shift:] + names[:shift]:
                gc.collect(0)  # garbage of one contender is not the next one's
                gc.disable()
                together()
                start = clock()
                contenders[name]()
                together()
                times_s[name].append(clock() - start)
                if was_enabled:
                    gc.enable()
    finally:
        if was_enabled:
            gc.enable()
    return {name: values[warmup:] for name, values in times_s.items()}


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(of, to, strict=True)]
