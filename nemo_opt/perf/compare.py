"""A change against its base: `compare(base, head, ...)` measures both in interleaved pairs and judges every series.

Decisions:
- Eight pairs first; where they leave anything undecided, eight more, once (`nemo_opt.perf.pairs`): the declared rule, not another try.
- A pair's value of the change is the base's times the middle of the turns' ratios, since turns that were taken side by side are alike.
- Counts that are the same in each run (`benchmarks/test_exact.py`) are measured once in each tree, and judged by equality.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from nemo_opt.errors import ConfigError
from nemo_opt.perf import judge
from nemo_opt.perf.accepted import Accepted
from nemo_opt.perf.duel import Pair, duel
from nemo_opt.perf.pairs import MIN_PAIRS, MORE_PAIRS, middle
from nemo_opt.perf.platform import environment, platform_key
from nemo_opt.perf.record import Figure, Record, read
from nemo_opt.perf.trees import Tree
from nemo_opt.perf.verdict import Judgement

__all__ = ["Comparison", "Measurement", "compare", "counts", "measurements"]

CLOCKS = {"time": "time_s", "processor time": "processor_s"}
"""Name of the figure: field of a turn."""

_COUNTS_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One that `benchmarks/pulse.py` offers."""

    number: int
    """There."""
    bench: str
    """What is measured."""
    case: str
    """Of which size and layout."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out."""

    base: tuple[Record, ...]
    """Runs of the base, one a pair."""
    head: tuple[Record, ...]
    """Runs of the change, each beside the base's."""
    judgements: tuple[Judgement, ...]
    """From the most severe."""
    other_results: tuple[str, ...]
    """Measurements that computed something else than in the base."""


def measurements(pulse: Path, only: str = "") -> list[Measurement]:
    """Those whose name contains `only`.

    Raises:
        ConfigError: There are none.

    """
    listing = "import pulse\nfor p in pulse.PULSES: print(p.bench, p.case, sep='\\t')"
    command = [sys.executable, "-c", listing]
    lines = subprocess.run(command, cwd=pulse.parent, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    found = [Measurement(number=i, bench=line.split("\t")[0], case=line.split("\t")[1]) for i, line in enumerate(lines)]
    chosen = [one for one in found if only.lower() in f"{one.bench}, {one.case}".lower()]
    if not chosen:
        names = "; ".join(f"{one.bench}, {one.case}" for one in found)
        raise ConfigError(f"no measurement's name contains {only!r}: choose from {names}")
    return chosen


def compare(
    base: Tree,
    head: Tree,
    pulse: Path,
    chosen: Sequence[Measurement],
    *,
    exact: Path | None = None,
    accepted: Sequence[Accepted] = (),
    tick: Callable[[], object] = lambda: None,
) -> Comparison:
    """Measures and judges.

    Args:
        base: The tree to compare with.
        head: The tree of the change.
        pulse: The measuring program.
        chosen: Its measurements that count.
        exact: The benchmarks of counts; None leaves them out.
        accepted: Entries that the change adds.
        tick: Called after each pair.

    Raises:
        DuelError: A tree cannot be measured.

    """
    same = counts(base, head, exact) if exact else ((), ())
    numbers = [one.number for one in chosen]
    pairs: dict[int, list[Pair]] = {number: [] for number in numbers}
    for wanted in (MIN_PAIRS, MORE_PAIRS):
        more = duel(base, head, pulse, numbers, wanted - MIN_PAIRS or MIN_PAIRS, tick=tick)
        for number, found in more.items():
            pairs[number] += found
        records = [_records(tree, chosen, pairs, side, same[side], wanted) for side, tree in enumerate((base, head))]
        judgements = judge.compare(records[0], records[1], accepted)
        if not any(judgement.unconfirmed for judgement in judgements):
            break
    changed = tuple(f"{one.bench}, {one.case}" for one in chosen if not all(pair.same_result for pair in pairs[one.number]))
    return Comparison(base=tuple(records[0]), head=tuple(records[1]), judgements=tuple(judgements), other_results=changed)


def _records(
    tree: Tree, chosen: Sequence[Measurement], pairs: Mapping[int, Sequence[Pair]], side: int, same: Sequence[Figure], count: int
) -> list[Record]:
    run = Record(
        started=datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"),
        commit=tree.sources.commit,
        dirty=tree.sources.dirty,
        subject=tree.sources.subject,
        platform=platform_key(),
        environment=environment(),
        load=(os.getloadavg()[0], os.getloadavg()[0]),
        figures=(),
    )
    return [
        replace(
            run,
            run_id=f"{i:08x}",
            figures=(*same, *(_figure(one, pairs[one.number][i], side, clock) for one in chosen for clock in CLOCKS)),
        )
        for i in range(count)
    ]


def _figure(one: Measurement, pair: Pair, side: int, clock: str) -> Figure:
    base, head = ([getattr(turn, CLOCKS[clock]) for turn in turns] for turns in (pair.base, pair.head))
    value = statistics.median(base)
    if side == 1:
        value *= math.exp(middle(np.log(np.asarray(head) / np.asarray(base))))
    return Figure(bench=one.bench, case=one.case, metric=clock, kind="time", unit="s", value=value, samples=tuple((base, head)[side]))


def counts(base: Tree, head: Tree, exact: Path) -> tuple[tuple[Figure, ...], tuple[Figure, ...]]:
    """Figures of the kinds exact and memory in both trees.

    Raises:
        ConfigError: The benchmarks of the counts fail in a tree.

    """
    return _counts(base, exact), _counts(head, exact)


def _counts(tree: Tree, exact: Path) -> tuple[Figure, ...]:
    with tempfile.TemporaryDirectory(prefix="nemo_opt_counts_") as folder:
        command = [sys.executable, "-m", "pytest", str(exact), "-q", "-m", "not wide", "-p", "no:cacheprovider", "--record-to", folder]
        # The benchmarks, and what records them, are this tree's, the library the other's, except where they need what only this one has.
        environment_of_it = os.environ | {"PYTHONPATH": str(tree.root), "NEMO_OPT_FORK_SERVER": ""}
        done = subprocess.run(
            command, cwd=tree.root, env=environment_of_it, capture_output=True, text=True, timeout=_COUNTS_TIMEOUT_S, check=False
        )
        records = [read(place) for place in Path(folder).glob("*/*.json")]
    if done.returncode or len(records) != 1:
        raise ConfigError(f"{tree.name}: {exact.name} fails:\n{(done.stdout + done.stderr)[-3000:]}")
    return tuple(figure for figure in records[0].figures if figure.kind in ("exact", "memory"))
