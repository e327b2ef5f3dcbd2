"""Watches the other hosts of a job on several: `torchrun --nnodes N ... -m nemo_opt.hosts [--limit SECONDS] -m MODULE ARGS...`.

A host whose processes are killed closes its connections, and its peers fail at once. One that loses power or its network closes
nothing: peers wait for their collective's timeout (120 s), gloo then says how long it waited but not for whom, and torchrun names
the rank that waited. So each host beats in the agent's store, and looks at the beats of the others: one that was heard of and then
is silent for `LIMIT_S` is named on stderr, and the rank ends.

What then ends the job is torchrun, on the host with its store at once. On the others it still waits for the store (300 s and longer were
seen) until the kernel gives up on the connection: after a quarter of an hour, or half a minute with `sysctl net.ipv4.tcp_retries2=6`. A
limit below 25 s then names the host before that.

Decisions: only the first rank of a host beats; a host that was never heard of is not judged (the rendezvous has its own timeout); one
that ends in order says so. The store's client waits without a limit where the network is gone, so one thread exchanges, and another one
judges. Silence is counted in the judge's own rounds, so that a process that was stopped for a minute does not blame its peers.
"""

import argparse
import atexit
import os
import runpy
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["LIMIT_S", "Watch", "main", "watch"]

INTERVAL_S = 3.0
"""Between two beats."""

LIMIT_S = 30.0
"""Silence after which a host counts as lost: twice what torch's rendezvous allows, since a large library that loads stops all threads."""

_BYE = "bye"
_STORE_HOST = 0  # torchrun puts the store on the host of group rank 0
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 2.0


@dataclass
class _Heard:
    """The last beat of a host."""

    beat: str
    name: str
    time_s: float


class Watch:
    """The beats of one host, and its ear for those of the others. Starts when made, until `stop`."""

    def __init__(
        self,
        connect: "Callable[[], Store]",
        host: int,
        hosts: int,
        *,
        name: str,
        lost: Callable[[str], None],
        interval_s: float = INTERVAL_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Starts both threads.

        Args:
            connect: Makes a client of the store, for this watch alone.
            host: Number of this host among `hosts`.
            hosts: How many there are.
            name: How the others shall name this one.
            lost: Called once, with a message that names the host.
            interval_s: Between two beats.
            limit_s: Silence after which a host counts as lost.

        """
        self._connect, self._host, self._hosts, self._name, self._lost = connect, host, hosts, name, lost
        self._interval_s, self._limit_s = interval_s, limit_s
        self._heard: dict[int, _Heard] = {}
        self._round_s: float | None = None
        self._clock_s = 0.0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Says to the others that this host ends in order."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_STOP_TIMEOUT_S)

    def _exchange(self) -> None:
        try:
            store = self._connect()
            beat = 0
            while not self._stopped.is_set():
                beat += 1
                store.set(_key(self._host), f"{beat} {self._name}")
                self._listen(store)
                self._round_s = self._clock_s
                self._stopped.wait(self._interval_s)
            store.set(_key(self._host), _BYE)
        except RuntimeError:
            return  # the store is gone: there are no more rounds, which `_judge` sees

    def _listen(self, store: "Store") -> None:
        for other in range(self._hosts):
            if other == self._host or not store.check([_key(other)]):
                continue
            beat, _, name = store.get(_key(other)).decode().partition(" ")
            before = self._heard.get(other)
            if before is None or before.beat != beat:
                self._heard[other] = _Heard(beat, name or (before.name if before else ""), self._clock_s)

    def _judge(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._clock_s += self._interval_s
            if message := _verdict(dict(self._heard), self._round_s, self._clock_s, self._limit_s):
                self._lost(message)
                return


def _verdict(heard: Mapping[int, _Heard], round_s: float | None, now_s: float, limit_s: float) -> str:
    """Who is lost at `now_s`, when the last exchange with the store was at `round_s`; empty while all is well."""
    if round_s is None or any(h.beat == _BYE for h in heard.values()):
        return ""  # not begun, or coming to its end: the store may go with its host
    if now_s - round_s > limit_s:
        name = heard[_STORE_HOST].name if _STORE_HOST in heard else "of rank 0"
        return f"host {name} was lost: the store on it has not answered for {now_s - round_s:.0f} s"
    silent = [h for h in heard.values() if now_s - h.time_s > limit_s]
    return "; ".join(f"host {h.name} was lost: no sign of it for {now_s - h.time_s:.0f} s" for h in silent)


def _key(host: int) -> str:
    return f"nemo_opt/host/{host}"


def watch(limit_s: float = LIMIT_S) -> Watch | None:
    """Watches the other hosts of torchrun's job; None where there are none, or another rank of this host does it."""
    environment = os.environ
    hosts = int(environment.get("GROUP_WORLD_SIZE", "1"))
    if hosts == 1 or environment["LOCAL_RANK"] != "0":
        return None
    first, count = int(environment["RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    name = f"{socket.gethostname()} ({ranks})"
    started = Watch(_connect, int(environment["GROUP_RANK"]), hosts, name=name, lost=_end, limit_s=limit_s)
    atexit.register(started.stop)
    return started


def _connect() -> "Store":
    """A client of the store that torchrun's agent keeps on the first host."""
    from torch._C._distributed_c10d import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_START_TIMEOUT_S))


def _end(message: str) -> None:
    """Names the host and ends this rank: its main thread hangs in a collective, and cannot be asked to."""
    print(f"nemo_opt: {message}; {socket.gethostname()} ends", file=sys.stderr, flush=True)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `-m MODULE ARGS...` as the program, watched."""
    parser = argparse.ArgumentParser(
        "python -m nemo_opt.hosts", description="Runs a module as a program, and watches the job's other hosts."
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="silence after which a host counts as lost (%(default)s)"
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, required=True, metavar="MODULE ...", help="the program and its arguments"
    )
    options = parser.parse_args(arguments)
    if options.limit <= INTERVAL_S:
        parser.error(f"--limit {options.limit:g} must be above the {INTERVAL_S:g} s between two beats")
    if not options.module:
        parser.error("name a module after -m")
    watch(options.limit)
    sys.argv = options.module
    runpy.run_module(options.module[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
