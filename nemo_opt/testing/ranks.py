"""Warm pools of rank processes for tests: `RankPools()(2).run(function, *args)` calls `function` on two ranks.

Decisions:
- Ranks are forked from multiprocessing's fork server, which has imported the stack once (`nemo_opt.testing.preload`). A pool is kept for
  many dispatches; its world (gloo or nccl, through a file store: no port to race for) lives as long, Megatron-Core's groups a dispatch.
- A failure ends everything: the first rank that raises or dies is reported with its traceback, the pool is discarded, the next run starts
  a new one. So no test sees what another one broke.
- Every wait is bounded. When a dispatch exceeds its time, every rank's stack (of all its threads) is in the error.
- Functions travel by name, not by value: module-level ones only. A test module is loaded from its file under the name that pytest gave it.
"""

import atexit
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["RankError", "RankPool", "RankPools", "RankTimeoutError", "prepare"]

START_TIMEOUT_S = 180.0
"""For the fork server's imports and the ranks' rendezvous; the imports take 15 s alone and 60 s on a loaded 2-core machine."""
RUN_TIMEOUT_S = 120.0
"""For one dispatch where the caller says nothing; the slowest tests take a few seconds."""
_GRACE_S = 0.3  # after the first failure, for the other ranks to report: the cause and its consequences come within milliseconds
# For a rank to leave on request, before it is killed; what coverage has measured in a long session takes longer to write.
_END_S = 60.0 if "NEMO_OPT_COVERAGE_MARKS" in os.environ else 5.0

_REMEDY = "`python -m nemo_opt.testing.preload` shows what it imports and why that fails"

_context = multiprocessing.get_context("forkserver")


class RankError(RuntimeError):
    """A rank raised or died; the message names the rank and holds its traceback."""


class RankTimeoutError(RankError, TimeoutError):
    """The ranks did not finish in time; the message holds every rank's stack."""


def prepare() -> None:
    """Start the fork server's imports now, in the background. Call early: they overlap with the caller's own imports."""
    from multiprocessing import forkserver

    _context.set_forkserver_preload(["nemo_opt.testing.preload"])
    forkserver.ensure_running()


@dataclass(frozen=True)
class _Call:
    """A function by name, and its pickled arguments; these are read only once the function's module is loaded."""

    module: str
    file: str | None
    qualname: str
    arguments: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        module, qualname = function.__module__, function.__qualname__
        if "<" in qualname:
            raise TypeError(f"{qualname} cannot be found by name on a rank: define it at module level")
        file = getattr(sys.modules[module], "__file__", None)
        return cls(module, file, qualname, pickle.dumps((args, kwargs)))

    def __call__(self) -> Any:
        target: Any = self._load()
        for name in self.qualname.split("."):
            target = getattr(target, name)
        args, kwargs = pickle.loads(self.arguments)  # noqa: S301 - from the parent process
        return target(*args, **kwargs)

    def _load(self) -> Any:
        if self.module in sys.modules:
            return sys.modules[self.module]
        if self.module.split(".")[0] == "nemo_opt" or self.file is None:
            return importlib.import_module(self.module)
        spec = importlib.util.spec_from_file_location(self.module, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


class RankPool:
    """`size` warm ranks. Use it through `RankPools`, which replaces a pool that has failed."""

    def __init__(self, size: int, *, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self.size = size
        self.broken = False
        self._folder = tempfile.TemporaryDirectory(prefix="nemo_opt_ranks_")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        prepare()
        deadline = time.monotonic() + start_timeout_s
        for rank in range(size):
            self._start(rank, deadline)
        self._collect(deadline, start_timeout_s)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = RUN_TIMEOUT_S, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank; returns the results in order of ranks.

        Raises:
            RankError: A rank raised or died. `RankTimeoutError` where they did not finish within `timeout_s`.
            TypeError: The function or its arguments cannot travel to another process.

        """
        if self.broken:
            raise RankError(f"this pool of {self.size} ranks has failed before: take a new one")
        call = pickle.dumps(_Call.of(function, args, kwargs))
        deadline = time.monotonic() + timeout_s
        for connection in self._connections:
            with suppress(BrokenPipeError):  # its rank has died, which _collect reports
                connection.send_bytes(call)
        return self._collect(deadline, timeout_s)

    def close(self) -> None:
        """End the ranks: by request, by SIGKILL if that takes longer than a few seconds."""
        if not self.broken:
            for connection in self._connections:
                with suppress(OSError):
                    connection.send_bytes(b"")
            _join(self._processes, _END_S)
        self._kill()

    def _start(self, rank: int, deadline: float) -> None:
        ours, theirs = _context.Pipe()
        arguments = (rank, self.size, self._folder.name, theirs)
        process = _context.Process(target=_rank_main, args=arguments, name=f"rank {rank} of {self.size}")
        starter = ThreadPoolExecutor(1)  # start() waits without a limit for the fork server
        try:
            starter.submit(process.start).result(timeout=max(0.0, deadline - time.monotonic()))
        except (TimeoutError, EOFError, ConnectionError) as error:
            self._kill()
            raise RankError(
                f"the fork server of the test ranks is {'stuck' if isinstance(error, TimeoutError) else 'dead'}: {_REMEDY}"
            ) from error
        finally:
            starter.shutdown(wait=False)
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def _collect(self, deadline: float, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[int, str]] = []
        while len(results) + len(failures) < self.size and (left := deadline - time.monotonic()) > 0:
            done = {rank for rank, _ in failures} | results.keys()
            ready = wait([c for rank, c in enumerate(self._connections) if rank not in done], timeout=left)
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                succeeded, value = self._receive(rank)
                if succeeded:
                    results[rank] = value
                else:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                    failures.append((rank, value))
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        raise self._failure(failures, timeout_s)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            succeeded, value = pickle.loads(self._connections[rank].recv_bytes())  # noqa: S301 - from our own rank
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(timeout=_END_S)
            return False, f"died with exit code {self._processes[rank].exitcode}"
        return succeeded, value

    def _failure(self, failures: list[tuple[int, str]], timeout_s: float) -> RankError:
        """End the pool and describe why; the first failure in full, the others (mostly its consequences) by their last lines."""
        self.broken = True
        if not failures:
            stacks = self._stacks()
            self._kill()
            return RankTimeoutError(f"{self.size} ranks did not finish in {timeout_s:g} s\n{stacks}")
        (rank, first), *others = failures
        output = self._output(rank)
        self._release([rank for rank, _ in failures])
        also = [f"rank {r} of {self.size} too: {text.strip().splitlines()[-1]}" for r, text in others]
        self._kill()
        return RankError("\n".join([f"rank {rank} of {self.size} {first.strip()}", *also, *([f"its output:\n{output}"] if output else [])]))

    def _release(self, ranks: list[int]) -> None:
        """Let ranks that have reported end by themselves, so that what they measured (coverage) is kept."""
        for rank in ranks:
            with suppress(OSError):
                self._connections[rank].send_bytes(b"")
        _join([self._processes[rank] for rank in ranks], _END_S)

    def _stacks(self) -> str:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(_GRACE_S)
        return "\n".join(f"--- rank {rank}\n{self._output(rank)}" for rank in range(self.size))

    def _output(self, rank: int, limit: int = 6000) -> str:
        path = _output_file(self._folder.name, rank)
        return path.read_text(errors="replace")[-limit:].strip() if path.exists() else ""

    def _kill(self) -> None:
        self.broken = True
        for process in self._processes:
            process.kill()
        _join(self._processes, _END_S)
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


class RankPools:
    """Pools by size, started at first use and replaced after a failure: `pools(2).run(function)`. Close it, or use it in `with`."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}
        # multiprocessing joins its children at exit: pools that are still open then must go first.
        atexit.register(self.close)

    def __call__(self, size: int) -> RankPool:
        """The warm pool of `size` ranks."""
        pool = self._pools.get(size)
        if pool is None or pool.broken:
            pool = self._pools[size] = RankPool(size)
        return pool

    def close(self) -> None:
        """End all pools."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> "RankPools":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _join(processes: list[Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))


def _output_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.log"


def _rank_main(rank: int, size: int, folder: str, connection: Connection) -> None:
    """The life of one rank: rendezvous, then calls until an empty message or the end of the parent."""
    output = _output_file(folder, rank).open("a")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    is_healthy = _answer(connection, lambda: _join_world(rank, size, folder))
    while message := _next_message(connection):
        output.truncate(0)  # not after the call: its output explains a failure
        is_healthy = _answer(connection, lambda message=message: _run(message))  # type: ignore[misc]
    import torch.distributed as dist

    if is_healthy and dist.is_initialized():  # after a failure its peers may be gone
        dist.destroy_process_group()


def _leave_with_parent() -> None:
    """A test session that was killed must not leave ranks behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _next_message(connection: Connection) -> bytes:
    try:
        return connection.recv_bytes()
    except EOFError:
        return b""


def _answer(connection: Connection, call: Callable[[], Any]) -> bool:
    succeeded = True
    try:
        answer = pickle.dumps((True, call()))
    except BaseException:  # noqa: BLE001 - reported to the parent, which ends this rank
        succeeded, answer = False, pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(answer)
    return succeeded


def _join_world(rank: int, size: int, folder: str) -> None:
    from datetime import timedelta

    import nemo_opt._stack

    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from nemo_opt.device import choose_device

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a rank that is killed leaves behind
    choice = choose_device()
    if choice.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.FileStore(f"{folder}/store", size)  # type: ignore[attr-defined]
    dist.init_process_group(choice.backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=RUN_TIMEOUT_S))


def _run(message: bytes) -> Any:
    from nemo_opt import parallel

    try:
        result = pickle.loads(message)()  # noqa: S301 - from the parent process
    except BaseException:
        parallel.destroy(wait=False)
        raise
    parallel.destroy()
    return result
