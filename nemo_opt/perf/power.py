"""What the rules find and what they invent, by simulation on noise that was measured: `python -m nemo_opt.perf.power HISTORY_FOLDER`.

Decisions:
- The noise is that of recorded runs: deviations of every series from its median, drawn again in blocks, so that busy hours stay together.
  The fresh runs of a run are the recorded ones after it.
- Pairs are those of `compare`, of a tree with itself (`bench compare . . --pairs FILE`): drawn pair by pair with both clocks, found where
  either clock says so, extended where either is inconclusive. Without them pairs are recorded neighbours.
- Where there is no history of enough runs the pairs are one: a figure is a ratio of two that took turns, as a pair is, of fresh processes.
  With --times it is the base's own times, which move with the machine's other tenants.
- Rivals (`nemo_opt.perf.rivals`) see the same draws.
- A rate is per check of one series, lower being better; the slowdowns are of 5 % and 10 %.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_opt.errors import DataError, NemoOptError
from nemo_opt.perf.change_point import Values
from nemo_opt.perf.detector import FRESH_RUNS
from nemo_opt.perf.history import by_series, read_history
from nemo_opt.perf.otava import NAME, otava
from nemo_opt.perf.pair_file import read_pairs
from nemo_opt.perf.pairs import judge_pairs
from nemo_opt.perf.record import Record
from nemo_opt.perf.rivals import RULES, Draw, Rule
from nemo_opt.perf.verdict import Verdict

__all__ = ["Noise", "Row", "invented_noise", "main", "noise_of", "power_table"]

MIN_RUNS = 10
"""Of a series that tells something of its noise."""

BLOCK = 6
"""Neighbouring runs that are drawn together; even, so that pairs stay together."""

CHECKS = 6
"""Runs after a change that are judged."""

SLOWDOWNS = (0.05, 0.10)
"""That must be found."""

ROUNDS = 20
"""Of a run, for the rival that compares rounds."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far runs of the same sources lie apart."""

    deviations: tuple[Values, ...]
    """Of each series, logarithms of the values over their median, in order of the runs."""
    rounds: float = 0.01
    """Relative deviation of the rounds of one run."""
    pairs: tuple[Values, ...] = ()
    """Of each measurement, logarithms of the ratios of its pairs, [pairs, clocks]; none where none were recorded."""

    @property
    def deviation(self) -> float:
        """Relative standard deviation of a run, the median over the series."""
        return float(np.median([deviations.std() for deviations in self.deviations]))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule and its rates, from 0 to 1."""

    rule: str
    """What it is called."""
    false_alarm: float
    """Checks that fail though nothing changed."""
    inconclusive: float
    """Checks that could not decide, though nothing changed; 0 for rules that always decide."""
    five_at_once: float
    """A slowdown of 5 % that the first check finds."""
    five_in_3: float | None = None
    """One of the first three; None where there is only one."""
    five_in_6: float | None = None
    """One of the first six."""
    ten_at_once: float
    """The same for 10 %."""
    ten_in_3: float | None = None
    """The same."""


def noise_of(records: Sequence[Record]) -> Noise:
    """The noise of recorded runs of the same sources.

    Raises:
        DataError: No time or ratio was measured often enough.

    """
    points = {series: found for series, found in by_series(records).items() if found[0].figure.kind in ("ratio", "time")}
    often = {series: found for series, found in points.items() if len(found) >= MIN_RUNS}
    if not often:
        most = max((len(found) for found in points.values()), default=0)
        raise DataError(f"no time or ratio was measured {MIN_RUNS} times, the most is {most}: record more runs of the same sources")
    logs = [np.log([point.value for point in found]) for found in often.values()]
    spreads = [spread for found in often.values() for point in found if (spread := point.figure.spread) is not None]
    rounds = 1.4826 * float(np.median(spreads)) if spreads else Noise.rounds
    return Noise(deviations=tuple(values - np.median(values) for values in logs), rounds=rounds)


def recorded_noise(place: Path, *, times: bool = False) -> Noise:
    """Of the pairs that `bench compare . . --pairs` has kept.

    Args:
        place: The file.
        times: A history is one of the base's times; or else of ratios.

    Raises:
        DataError: The file is not one of pairs, or no measurement has enough of them.

    """
    found = {name: values for name, values in read_pairs(place).items() if len(values) >= MIN_RUNS}
    if not found:
        raise DataError(f"{place}: no measurement has {MIN_RUNS} pairs: record more comparisons")
    logs = [np.log(values) for values in found.values()]
    pairs = [both[:, 1] - both[:, 0] for both in logs]
    series = [clock for values in ([both[:, 0] for both in logs] if times else pairs) for clock in values.T]
    return Noise(deviations=tuple(clock - np.median(clock) for clock in series), pairs=tuple(pairs))


def invented_noise(*, deviation: float = 0.02, outliers: float = 0.03, likeness: float = 0.0, seed: int = 0) -> Noise:
    """Noise like that of a shared runner, where none was recorded: normal, with some runs 10 % slower.

    Args:
        deviation: Relative, between runs.
        outliers: Share of the slow runs.
        likeness: Correlation of neighbouring runs.
        seed: Of the draws.

    """
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=2000)
    for i in range(1, len(steps)):
        steps[i] = likeness * steps[i - 1] + math.sqrt(1 - likeness**2) * steps[i]
    return Noise(deviations=(deviation * steps + math.log(1.1) * (rng.random(len(steps)) < outliers),))


PAIRS = ((8, 8), (12, 12), (16, 16), (8, 16))
"""Numbers of pairs, and up to how many more where the first are inconclusive."""


def _pairs_rule(differences: Values, pairs: int, most: int) -> bool | None:
    """What `compare` says of a measurement's pairs, [pairs, clocks]: True where it fails by either clock, None where it cannot tell."""
    for n in (pairs, most):
        verdicts = [judge_pairs([1.0] * n, np.exp(clock[:n]).tolist()).verdict for clock in differences.T]
        if Verdict.INCONCLUSIVE not in verdicts:
            break
    if any(verdict.fails for verdict in verdicts):
        return True
    return None if Verdict.INCONCLUSIVE in verdicts else False


# The simulation -----------------------------------------------------------------------------------------------


def power_table(noise: Noise, *, trials: int = 400, runs: int = 30, seed: int = 0, rules: Mapping[str, Rule] = RULES) -> list[Row]:
    """What every rule finds in draws of the noise; the same for the same seed.

    Args:
        noise: Of which is drawn.
        trials: Histories for each slowdown.
        runs: Of a history before the change.
        seed: Of the draws.
        rules: That judge a history.

    """
    rows = []
    for name, rule in rules.items():
        quiet, five, ten = (_histories(noise, rule, size, trials, runs, seed) for size in (0.0, *SLOWDOWNS))
        rows.append(
            Row(
                rule=name,
                false_alarm=_share(quiet, True),
                inconclusive=_share(quiet, None),
                five_at_once=_found(five, 1),
                five_in_3=_found(five, 3),
                five_in_6=_found(five, CHECKS),
                ten_at_once=_found(ten, 1),
                ten_in_3=_found(ten, 3),
            )
        )
    for pairs, most in PAIRS:
        quiet, five, ten = (_comparisons(noise, pairs, most, size, trials, seed) for size in (0.0, *SLOWDOWNS))
        rows.append(
            Row(
                rule=f"{pairs} pairs{f', {most} where inconclusive' if most > pairs else ''}: signed ranks, +3 %",
                false_alarm=_share(quiet, True),
                inconclusive=_share(quiet, None),
                five_at_once=_found(five, 1),
                ten_at_once=_found(ten, 1),
            )
        )
    return rows


def _histories(noise: Noise, rule: Rule, size: float, trials: int, runs: int, seed: int) -> list[list[bool | None]]:
    """For each trial, what the checks of the runs after a change say."""
    rng = np.random.default_rng(seed)
    return [[rule(draw) for draw in _draws(noise, size, runs, rng)] for _ in range(trials)]


def _draws(noise: Noise, size: float, runs: int, rng: np.random.Generator) -> list[Draw]:
    """What a rule sees at each run after a change."""
    deviations, path = _draw(noise.deviations, runs + CHECKS, rng)
    step = math.log1p(size)
    logs = deviations[path]
    logs[runs:] += step
    rounds = logs[:, None] + noise.rounds * rng.normal(size=(len(logs), ROUNDS))
    again = deviations[(path[:, None] + 1 + np.arange(FRESH_RUNS)) % len(deviations)] + step
    return [
        Draw(history=logs[:i], latest=float(logs[i]), fresh=again[i], rounds=(rounds[i - 1], rounds[i])) for i in range(runs, runs + CHECKS)
    ]


def _comparisons(noise: Noise, pairs: int, most: int, size: float, trials: int, seed: int) -> list[list[bool | None]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(trials):
        if noise.pairs:
            recorded, path = _draw(noise.pairs, most, rng)
            differences = recorded[path]
        else:
            deviations, path = _draw(noise.deviations, 2 * most, rng)
            differences = (deviations[path[1::2]] - deviations[path[::2]])[:, None]
        found.append([_pairs_rule(differences + math.log1p(size), pairs, most)])
    return found


def _draw(recorded: Sequence[Values], n: int, rng: np.random.Generator) -> tuple[Values, NDArray[np.int64]]:
    """One of the recorded, and `n` positions in it, by blocks of neighbours (Politis and Romano's circular block bootstrap)."""
    deviations = recorded[int(rng.integers(len(recorded)))]
    starts = rng.integers(len(deviations), size=-(-n // BLOCK))
    return deviations, ((starts[:, None] + np.arange(BLOCK)).ravel()[:n]) % len(deviations)


def _share(checks: list[list[bool | None]], what: bool | None) -> float:
    flat = [check for trial in checks for check in trial]
    return sum(check is what for check in flat) / len(flat)


def _found(checks: list[list[bool | None]], within: int) -> float:
    return sum(any(trial[:within]) for trial in checks) / len(checks)


# The command --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_opt.perf.power",
        description="False alarms and power of the rules, on the noise of recorded runs of the same sources.",
        epilog="Example: python -m nemo_opt.perf.power --pairs benchmarks/noise/x86-64-intel-r-xeon-r-processor-f6m207-2-cores.jsonl",
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of one platform; without it the noise is invented: 2 %%, 3 %% outliers")
    parser.add_argument("--pairs", type=Path, help="file of recorded pairs of a tree with itself (bench compare . . --pairs FILE)")
    parser.add_argument("--times", action="store_true", help="with --pairs and no folder: a history of times and not of ratios")
    parser.add_argument("--trials", type=int, default=400, help="histories for each slowdown (400)")
    parser.add_argument("--runs", type=int, default=30, help="of a history before the change (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--otava", type=Path, help="python of an environment with apache-otava: one more rival (ci/otava.sh makes it)")
    given = parser.parse_args(arguments)
    try:
        noise = recorded_noise(given.pairs, times=given.times) if given.pairs else invented_noise()
        if given.folder:
            noise = replace(noise_of(read_history(given.folder)), pairs=noise.pairs)
        with otava(given.otava) if given.otava else nullcontext() as rival:
            rules = RULES | ({NAME: rival} if rival else {})
            rows = power_table(noise, trials=given.trials, runs=given.runs, seed=given.seed, rules=rules)
        _print(noise, rows, given.trials)
    except NemoOptError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _print(noise: Noise, rows: Sequence[Row], trials: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{len(noise.deviations)} series, runs deviate by {noise.deviation:.1%}, rounds by {noise.rounds:.1%}; {trials} trials"
    if noise.pairs:
        clocks = ", ".join(f"{np.median([pairs.std(axis=0)[i] for pairs in noise.pairs]):.1%}" for i in range(noise.pairs[0].shape[1]))
        title += f"; {sum(map(len, noise.pairs))} pairs of {len(noise.pairs)} measurements, by clock {clocks}"
    heads = ("rule", "false alarm", "inconclusive", "+5 % at once", "in 3", "in 6", "+10 % at once", "in 3")
    table = Table(*heads, title=title)
    for row in rows:
        rates = (row.five_at_once, row.five_in_3, row.five_in_6, row.ten_at_once, row.ten_in_3)
        shown = ["-" if rate is None else f"{rate:.0%}" for rate in rates]
        table.add_row(row.rule, f"{row.false_alarm:.1%}", f"{row.inconclusive:.0%}", *shown)
    Console(width=None if Console().is_terminal else 150).print(table)


if __name__ == "__main__":
    sys.exit(main())
