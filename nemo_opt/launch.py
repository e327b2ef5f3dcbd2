"""Starts the ranks of a job, or joins those that torchrun started, and brings rank 0's result back.

Decisions:
- The parent stays light. The stack takes 9 s to import (18 s where bytecode may not be cached), so only ranks import it; several ranks
  are started by torch's elastic agent (which needs torch, 3 s), a single rank is a plain child process: the parent loads nothing at all.
- No port is chosen before use: the elastic rendezvous binds port 0 itself.
- The first failing rank ends the job, and its own message is shown, not those of the ranks that lost their peer.
- A job that is ended by SIGTERM, as what hangs is, shows where each rank was (`stacks`).
- Where a fork server is named (`forked`), ranks are forked from it instead: the functional suite starts hundreds.
- What crosses the process boundary is JSON (see `encode`), never pickle.
- glibc reads its allocator settings when a process starts, which is one more reason why a single rank is a child.

Loads no torch at import.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import nemo_opt.errors
from nemo_opt import stacks
from nemo_opt.device import expects_gpu
from nemo_opt.errors import ConfigError, NemoOptError
from nemo_opt.forked import run_forked

__all__ = ["RankFailedError", "decode", "encode", "joined", "local_world_size", "rank", "rank_environment", "run_ranks"]

ALLOCATOR_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""Keeps freed pages: 77 % of a CPU loss over [512, 4, 32000] were page faults (3.07 s -> 0.68 s with these)."""

MONITOR_INTERVAL_S = 0.1
"""How often the agent looks at its ranks."""

SHUTDOWN_TIMEOUT_S = 10
"""From SIGTERM to SIGKILL for the ranks that remain when one has failed."""

_RESULT, _JOB = "result.json", "job.json"


class RankFailedError(RuntimeError):
    """A rank ended by a bug or a signal; the message holds the rank and its traceback."""


def rank() -> int:
    """Rank of the process; 0 outside of a launched job."""
    return int(os.environ.get("RANK", "0"))


def joined() -> bool:
    """Whether some launcher (torchrun, or `run_ranks` itself) has started this process as one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_world_size() -> int:
    """Ranks of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def run_ranks(target: str, kwargs: Mapping[str, Any], *, devices: int = 1) -> Any:
    """Calls `target` ("package.module:function") with `kwargs` on every rank and returns rank 0's result.

    Under torchrun this process is a rank already: the function is called here and each rank gets its own result.

    Args:
        target: A module-level function; its module is imported in the ranks only.
        kwargs: Plain values, paths and nemo_opt's dataclasses (see `encode`).
        devices: Ranks to start on this machine.

    Raises:
        NemoOptError: What a rank raised because of bad input, with its message.
        RankFailedError: A rank failed otherwise.
    """
    if devices < 1:
        raise ConfigError(f"devices {devices} is not a number of ranks: give at least 1")
    if joined():
        if devices != local_world_size():
            raise ConfigError(
                f"devices {devices} != {local_world_size()} ranks that the launcher started here: give --devices {local_world_size()}"
            )
        return resolve(target)(**kwargs)
    with tempfile.TemporaryDirectory(prefix="nemo_opt_job_") as directory:
        job = Path(directory)
        (job / _JOB).write_text(json.dumps({"target": target, "kwargs": encode(dict(kwargs))}))
        try:
            with _environment(rank_environment(devices)), stacks.terminable():
                _start(job, devices)
        except stacks.TerminatedError:
            raise RankFailedError(f"ended by SIGTERM, while its ranks were here:\n{stacks.read(job, devices)}") from None
        return read_result(job)


def resolve(target: str) -> Any:
    """The function that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------------------- starting


def _start(job: Path, devices: int) -> None:
    exits = run_forked(job, devices)
    if exits is not None:
        _raise_any_failure(job, exits)
    elif devices == 1:
        _run_child(job)
    else:
        _run_elastic(job, devices)


def rank_environment(devices: int) -> dict[str, str]:
    """What ranks need in their environment from their first instruction; the user's own settings win."""
    wanted: dict[str, str] = {"TOKENIZERS_PARALLELISM": "false"}
    if devices > 1:
        wanted["OMP_NUM_THREADS"] = "1"  # several ranks share the cores; one rank may use them all
    if not expects_gpu():
        wanted |= ALLOCATOR_ENV
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _command(job: Path) -> list[str]:
    return [sys.executable, "-m", "nemo_opt._rank", str(job)]


def _run_child(job: Path) -> None:
    """One rank: a child process, without torch in this one."""
    child = subprocess.Popen(_command(job))
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        try:
            child.wait(SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise
    _raise_any_failure(job, {0: (code, time.time())})


def _run_elastic(job: Path, devices: int) -> None:
    """Several ranks, through torch's elastic agent with a rendezvous of its own."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet_elastic()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # the host's name may not resolve in containers
        max_restarts=0,
        monitor_interval=MONITOR_INTERVAL_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(job / "logs")),
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    program, *arguments = _command(job)
    try:
        elastic_launch(config, program)(*arguments)
    except ChildFailedError as error:
        _raise_failure(job, {r: (f.exitcode, float(f.timestamp)) for r, f in error.failures.items()})
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        if error.sigval == signal.SIGTERM:
            raise stacks.TerminatedError from None
        raise RankFailedError(f"ended by {signal.Signals(error.sigval).name}") from None


def _quiet_elastic() -> None:
    """The agent logs each failure at length; the message of the failing rank is shown instead. LOGLEVEL still opens it."""
    import logging

    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)


# ---------------------------------------------------------------------------------------------------------------- results


def write_result(job: Path, value: Any) -> None:
    """Leaves rank 0's result for the parent."""
    (job / _RESULT).write_text(json.dumps(encode(value)))


def read_result(job: Path) -> Any:
    """The result that rank 0 has left."""
    path = job / _RESULT
    if not path.exists():
        raise RankFailedError("rank 0 ended without a result and without an error")
    return decode(json.loads(path.read_text()))


def write_failure(job: Path, error: BaseException, traceback_text: str) -> None:
    """Leaves what this rank failed of, with the time, so that the first failure can be told from its consequences."""
    record = {
        "time": time.time(),
        "kind": type(error).__name__,
        "user": isinstance(error, NemoOptError),
        "message": str(error),
        "traceback": traceback_text,
    }
    (job / f"error-{rank()}.json").write_text(json.dumps(record))


def _raise_any_failure(job: Path, exits: Mapping[int, tuple[int, float]]) -> None:
    if any(code for code, _ in exits.values()):
        _raise_failure(job, {rank: (code, noticed) for rank, (code, noticed) in exits.items() if code})


def _raise_failure(job: Path, exits: Mapping[int, tuple[int, float]]) -> NoReturn:
    """Raises what the first failing rank failed of. `exits`: rank -> (exit code, time it was noticed)."""
    records = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in job.glob("error-*.json")}
    first = min(records, key=lambda r: records[r]["time"], default=None)
    # A rank that a signal ended leaves no record, and its peers fail of the lost connection a moment later. Ranks that the agent
    # ends itself get SIGTERM at once, or SIGKILL only after SHUTDOWN_TIMEOUT_S.
    limit = float("inf") if first is None else records[first]["time"] + SHUTDOWN_TIMEOUT_S / 2
    for failed, (code, noticed) in sorted(exits.items(), key=lambda item: item[1][1]):
        if failed not in records and code < 0 and noticed < limit and (first is None or code != -signal.SIGTERM):
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise RankFailedError(f"rank {failed} was ended by {signal.Signals(-code).name}{hint}")
    if first is None:
        codes = ", ".join(f"rank {r}: exit {code}" for r, (code, _) in sorted(exits.items()))
        raise RankFailedError(f"ranks ended without a message ({codes})")
    record = records[first]
    if record["user"]:
        raise getattr(nemo_opt.errors, record["kind"], NemoOptError)(record["message"])
    raise RankFailedError(f"rank {first} failed:\n{record['traceback'].rstrip()}")


# ---------------------------------------------------------------------------------------------------------------- JSON


def encode(value: Any) -> Any:
    """Plain JSON values for `value`: numbers, strings, paths, lists, dicts and dataclasses of this package."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"__dataclass__": kind, **{f.name: encode(getattr(value, f.name)) for f in fields(value) if f.init}}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} cannot be sent between processes: {value!r}")


def decode(value: Any) -> Any:
    """The inverse of `encode` (tuples come back as lists, paths as strings); builds nemo_opt's dataclasses only."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = {key: decode(item) for key, item in value.items() if key != "__dataclass__"}
    if (kind := value.get("__dataclass__")) is None:
        return items
    cls = resolve(kind) if kind.startswith("nemo_opt.") else None
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise TypeError(f"{kind} is not one of nemo_opt's dataclasses")
    return cls(**items)
