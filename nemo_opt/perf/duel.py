"""Two trees measured against each other: pairs of fresh ranks that take turns, one tree's second by second beside the other's.

Decisions:
- The sample is the pair, of processes that were forked for it; turns within a pair share their luck, and only make its value better.
- A pair's ratio is the middle of its turns' by Hodges and Lehmann: outliers hardly matter, and two thirds of a median's turns are enough.
- The measuring code (`benchmarks/pulse.py`) is the same for both; only `nemo_opt` comes from the trees.
- Trees take turns strictly, so that each runs after the other one: one that runs twice in a row finds its own data in the caches the
  second time, 10 % of a loss on logits. Who begins, and is started first, changes from pair to pair.
- On a busy machine a pair takes more turns, until its ratio is known well enough. How it comes out has no part in that, only its spread.
- The process that forks imports its tree's stack once; half of the pairs come from a second one, since the luck of an import would be
  the same for all pairs.
- Two clocks: the time between two barriers is what a user waits for, and includes what neighbours do to this machine; the processors' time
  of all ranks does not know of waiting, and hardly of neighbours.
- What computes another result than its base is said, and does not fail here: parity tests judge results.
"""

import json
import math
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opt.errors import NemoOptError
from nemo_opt.perf.trees import Tree

__all__ = ["DuelError", "Pair", "Turn", "duel"]

TURNS, MOST_TURNS = 8, 16
"""Of each tree in a pair: so many, and on until its ratio is known to `PRECISION` by one of the clocks, up to the second number."""

PRECISION = 0.015
"""Standard error of a pair's ratio. Eight turns reach it where turns deviate by 4 %, 16 where by 6 %. Of 2000 simulated comparisons
by eight pairs with normal noise 98.6 % found 5 % where pairs deviate by 2 %, 81 % where by 3 %."""

SAME_REL = 1e-5
"""Of two results that are the same: what layouts may differ by in float32."""
_WARMUP = 2
_GENERATIONS = 2
_TIMEOUT_S = 300.0  # for the imports of a loaded machine, the set-up of a pair, or one turn
_SIDES = ("base", "head")


class DuelError(NemoOptError):
    """A tree cannot be measured: its ranks fail, or do not answer."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of what is measured."""

    time_s: float
    """Between two barriers: the slowest rank's."""
    processor_s: float
    """Of all ranks together."""
    result: float
    """What it computed."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a pair measured."""

    base: tuple[Turn, ...]
    """Of the base, those that warm up left out."""
    head: tuple[Turn, ...]
    """Of the change; each beside the base's."""

    @property
    def same_result(self) -> bool:
        """Whether both computed the same in their last turn."""
        base, head = self.base[-1].result, self.head[-1].result
        return abs(base - head) <= SAME_REL * abs(base)


def duel(
    base: Tree, head: Tree, pulse: Path, numbers: Sequence[int], pairs: int, *, tick: Callable[[], object] = lambda: None
) -> dict[int, list[Pair]]:
    """Pairs of each measurement.

    Args:
        base: What it is compared with.
        head: The change.
        pulse: The measuring program.
        numbers: Of the measurements in it.
        pairs: How many of each.
        tick: Called after each pair.

    Raises:
        DuelError: Naming the tree, with what its ranks said.

    """
    found: dict[int, list[Pair]] = {number: [] for number in numbers}
    for generation in range(1, _GENERATIONS + 1):
        with ExitStack() as stack:
            order = (0, 1) if generation % 2 else (1, 0)
            servers = _by_side({side: stack.enter_context(_server((base, head)[side], pulse)) for side in order})
            for number, done in found.items():
                while len(done) < pairs * generation // _GENERATIONS:
                    done.append(_pair(servers, number, first=len(done) % 2))
                    tick()
    return found


def _by_side[T](found: Mapping[int, T]) -> tuple[T, T]:
    """What was made of the base and of the change, in whatever order."""
    return found[0], found[1]


@contextmanager
def _server(tree: Tree, pulse: Path) -> Iterator["_Server"]:
    environment = os.environ | {"PYTHONPATH": str(tree.root), "NEMO_OPT_FORK_SERVER": "", "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryFile() as log:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen([sys.executable, str(pulse)], cwd=tree.root, env=environment, **pipes) as process:
            try:
                yield _Server(tree, process, log)
            finally:
                process.kill()
                with suppress(BrokenPipeError):  # a request that it did not read would be sent again
                    process.stdin.close()  # type: ignore[union-attr]


class _Server:
    """The process that forks one tree's ranks."""

    def __init__(self, tree: Tree, process: subprocess.Popen[str], log: Any) -> None:
        self.tree, self._process, self._log = tree, process, log
        self.answers: Any = process.stdout

    def ask(self, number: int, address: str) -> None:
        """Starts the ranks of a measurement, which connect to the address."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"pulse": number, "address": address}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.error("ended") from None

    def await_end(self) -> None:
        """Its ranks are gone; raises what they failed of."""
        line = self.answers.readline() if _readable(self.answers) else ""
        failure = json.loads(line)["failure"] if line else "did not answer"
        if failure:
            raise self.error(failure)

    def error(self, what: str) -> DuelError:
        """With what it has printed."""
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-2000:]
        return DuelError(f"{self.tree.name} cannot be measured: {what}\n{said}".rstrip())


def _readable(file: Any) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        return bool(selector.select(_TIMEOUT_S))


def _pair(servers: Sequence[_Server], number: int, *, first: int) -> Pair:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo_opt_duel_"))
        order = (first, 1 - first)
        ranks = _by_side({side: stack.enter_context(_connected(servers[side], number, f"{folder}/{_SIDES[side]}")) for side in order})
        turns: tuple[list[Turn], list[Turn]] = ([], [])
        while len(turns[0]) < _WARMUP + TURNS or (len(turns[0]) < _WARMUP + MOST_TURNS and not _is_precise(*turns)):
            for side in order:
                turns[side].append(ranks[side]())
    for server in servers:
        server.await_end()
    return Pair(base=tuple(turns[0][_WARMUP:]), head=tuple(turns[1][_WARMUP:]))


def _is_precise(base: Sequence[Turn], head: Sequence[Turn]) -> bool:
    """Whether one of the clocks knows the ratio well enough."""
    beside = list(zip(base[_WARMUP:], head[_WARMUP:], strict=True))
    ratios = (
        [math.log(after.time_s / before.time_s) for before, after in beside],
        [math.log(after.processor_s / before.processor_s) for before, after in beside],
    )
    return min(_error_of_middle(logs) for logs in ratios) <= PRECISION


def _error_of_middle(values: Sequence[float]) -> float:
    """Standard error of Hodges and Lehmann's estimate, the deviation told from the median of the distances to the median."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return math.sqrt(math.pi / 3) * deviation / math.sqrt(len(values))


@contextmanager
def _connected(server: _Server, number: int, address: str) -> Iterator[Callable[[], Turn]]:
    """A function that lets the tree's ranks take a turn. They end with this."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(_TIMEOUT_S)
        server.ask(number, address)
        with _accepted(server, listener) as connection, connection.makefile("r") as answers:
            connection.settimeout(_TIMEOUT_S)

            def turn() -> Turn:
                try:
                    connection.sendall(b"t")
                    line = answers.readline()
                except OSError:
                    line = ""
                if not line:
                    server.await_end()
                    raise server.error("its ranks ended without a word")
                return Turn(**json.loads(line))

            yield turn


def _accepted(server: _Server, listener: socket.socket) -> socket.socket:
    """The ranks' connection; what they failed of where there is none."""
    deadline = time.monotonic() + _TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, "ranks")
        selector.register(server.answers, selectors.EVENT_READ, "server")
        for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
            if key.data == "ranks":
                return listener.accept()[0]
    server.await_end()
    raise server.error("its ranks did not start")
