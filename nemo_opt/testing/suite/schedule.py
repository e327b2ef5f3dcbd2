"""Which script runs when: the longest first, as many at once as the machine's ranks and memory allow."""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from nemo_opt.testing.suite.machine import Machine
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome

__all__ = ["GIB_PER_RANK", "run_all"]

GIB_PER_RANK = 1.0
"""For a script whose header does not say what it needs. Seen: 0.3 GiB on the fixtures; 1.3 and 0.5 on the two ranks of llama_68M."""

type Run = Callable[[Script, tuple[str, ...], threading.Event], Outcome]
"""Runs one script on these GPUs until it ends, or the event says stop."""


@dataclass
class _Running:
    """Scripts that run now, and what they hold."""

    machine: Machine
    jobs: int | None
    scripts: dict[Future[Outcome], Script] = field(default_factory=dict)
    gpus: dict[Future[Outcome], tuple[str, ...]] = field(default_factory=dict)

    def fits(self, script: Script) -> bool:
        """Whether it may start now: alone always; else within `jobs`, or where that is not given, within the machine's ranks."""
        if not self.scripts:
            return True
        held = self.scripts.values()
        if _memory(script) + sum(map(_memory, held)) > self.machine.memory_gib:
            return False
        if self.machine.gpus and script.ranks > len(self.free_gpus()):
            return False
        if self.jobs is not None:
            return len(held) < self.jobs
        return script.ranks + sum(other.ranks for other in held) <= self.machine.places

    def free_gpus(self) -> list[str]:
        """Those that no script holds."""
        taken = {gpu for held in self.gpus.values() for gpu in held}
        return [gpu for gpu in self.machine.gpus if gpu not in taken]

    def start(self, script: Script, submit: Callable[[Script, tuple[str, ...]], Future[Outcome]]) -> None:
        """Starts one that fits. Alone it sees all GPUs, so that its ranks can be forked (nemo_opt.forked)."""
        gpus = () if self.jobs == 1 else tuple(self.free_gpus()[: script.ranks])
        future = submit(script, gpus)
        self.scripts[future], self.gpus[future] = script, gpus

    def finished(self) -> list[Outcome]:
        """Waits for at least one; gives back what it held."""
        done, _ = wait(self.scripts, return_when=FIRST_COMPLETED)
        for future in done:
            del self.scripts[future], self.gpus[future]
        return [future.result() for future in done]


def _memory(script: Script) -> float:
    return script.memory_gib or script.ranks * GIB_PER_RANK


def run_all(scripts: Sequence[Script], machine: Machine, run: Run, *, jobs: int | None = None) -> Generator[Outcome]:
    """Runs `scripts` in their order, later ones that fit before earlier ones that do not; yields each as it ends.

    When the caller stops, or is interrupted, those that run are ended.
    """
    waiting, running, stop = list(scripts), _Running(machine, jobs), threading.Event()
    with ThreadPoolExecutor(max(len(scripts), 1)) as pool:
        try:
            while waiting or running.scripts:
                for script in list(waiting):
                    if running.fits(script):
                        waiting.remove(script)
                        running.start(script, lambda script, gpus: pool.submit(run, script, gpus, stop))
                yield from running.finished()
        finally:
            stop.set()
