"""A process that has imported the stack and forks the ranks of jobs on request: `with ForkServer(log) as environment: ...`.

What `nemo_opt.forked` talks to. Decisions:
- Each request gets an agent, a fork that starts the ranks, watches them and answers with their exit codes. The first failure ends all; so
  does the end of whoever asked, whose connection then closes. An agent dies with the server, a rank with its agent.
- The agent holds the store through which ranks meet, on a port that the system chooses while binding. Ranks are forked before, and
  wait for its number: nothing is forked from a process with threads.
- The server has one compute thread, as its ranks have unless OMP_NUM_THREADS says otherwise; CUDA is not touched before the fork.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from nemo_opt import _rank, forked
from nemo_opt.launch import SHUTDOWN_TIMEOUT_S, rank_environment

__all__ = ["ForkServer", "serve"]

START_TIMEOUT_S = 180.0
"""For the imports: 9 s on an idle machine of two cores where bytecode is cached, 60 s on a loaded one."""
_POLL_S = 0.02


@contextlib.contextmanager
def ForkServer(log: Path, *, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[dict[str, str]]:  # noqa: N802 - used like a class
    """Runs a server; yields the environment variable that names it. Its output goes to `log`.

    Raises:
        ForkServerError: it does not start in time, or dies while it imports.

    """
    with tempfile.TemporaryDirectory(prefix="nemo_opt_fork_") as folder, log.open("wb") as output:
        address = str(Path(folder) / "socket")
        command = [sys.executable, "-m", "nemo_opt.testing.fork_server", address]
        environment = {name: value for name, value in os.environ.items() if name != forked.SOCKET_ENV} | rank_environment(2)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        try:
            _await_socket(Path(address), process, log, time.monotonic() + start_timeout_s)
            yield {forked.SOCKET_ENV: address}
        finally:
            process.kill()
            process.wait()


def _await_socket(address: Path, process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while not address.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            state = "is not ready" if process.poll() is None else f"ended with exit code {process.poll()}"
            raise forked.ForkServerError(f"the fork server {state}; its log {log} ends with:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(_POLL_S)


def serve(address: str) -> NoReturn:
    """Imports the stack, then answers requests for ever; one agent each."""
    _rank.die_with_parent()
    _rank.quiet_upstream()
    import_module("nemo_opt.testing.preload")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents leave no zombies
    listener = socket.socket(socket.AF_UNIX)
    hidden = f"{address}.new"
    listener.bind(hidden)
    listener.listen(64)
    Path(hidden).rename(address)  # it can be connected to from the moment it is seen
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _leave_after(lambda connection=connection: _agent(connection))  # type: ignore[misc]
        connection.close()


def _leave_after(function: Any) -> NoReturn:
    code = 0
    try:
        function()
    except BaseException:  # noqa: BLE001 - a fork must never return into the server's loop
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _agent(connection: socket.socket) -> None:
    """Starts the ranks of one request, and answers with their exit codes."""
    _rank.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams = _receive(connection)
    answer = None if request["needs"] != forked.import_settings() else _run(request, streams, connection)
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        connection.sendall(json.dumps({"exits": answer}).encode())


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, parts = int.from_bytes(head), []
    while size > 0 and (part := connection.recv(size)):
        parts.append(part)
        size -= len(part)
    return json.loads(b"".join(parts)), streams


def _run(request: dict[str, Any], streams: list[int], connection: socket.socket) -> dict[int, tuple[int, float]]:
    import torch.distributed as dist

    gates = [os.pipe() for _ in range(request["devices"])]
    ranks = [_fork_rank(rank, request, streams, gate, connection) for rank, gate in enumerate(gates)]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    for _, gate in gates:
        os.write(gate, str(store.port).encode())
        os.close(gate)
    return _watch(dict(enumerate(ranks)), connection)


def _fork_rank(rank: int, request: dict[str, Any], streams: list[int], gate: tuple[int, int], connection: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        connection.close()  # its end is how the agent knows of a client that has died
        _leave_after(lambda: _become_rank(rank, request, streams, gate))
    os.close(gate[0])
    return pid


def _become_rank(rank: int, request: dict[str, Any], streams: list[int], gate: tuple[int, int]) -> None:
    import torch

    _rank.die_with_parent()
    os.close(gate[1])
    size = str(request["devices"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["devices"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size, GROUP_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.read(gate[0], 16).decode(), TORCHELASTIC_USE_AGENT_STORE="True")
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    _rank.live(Path(request["job"]))


def _watch(ranks: dict[int, int], connection: socket.socket) -> dict[int, tuple[int, float]]:
    """Exit codes of those that ended by themselves, once all are gone; they are ended when one has failed, or the client is gone."""
    exits: dict[int, tuple[int, float]] = {}
    ended_here: set[int] = set()
    kill_at = float("inf")
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        for rank, pid in ranks.items():
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, rank)
        while len(exits) < len(ranks):
            for key, _ in selector.select(timeout=None if kill_at == float("inf") else max(0.0, kill_at - time.monotonic())):
                selector.unregister(key.fileobj)
                if key.data is None:  # the client has closed its end
                    failed = True
                else:
                    code = os.waitstatus_to_exitcode(os.waitpid(ranks[key.data], 0)[1])
                    exits[key.data] = (code, time.time())
                    if kill_at < float("inf") and -code in (signal.SIGTERM, signal.SIGKILL):
                        ended_here.add(key.data)
                    failed = code != 0
                if failed and kill_at == float("inf"):
                    kill_at = time.monotonic() + SHUTDOWN_TIMEOUT_S
                    _signal(ranks, exits, signal.SIGTERM)
            if time.monotonic() >= kill_at:
                _signal(ranks, exits, signal.SIGKILL)
    return {rank: end for rank, end in exits.items() if rank not in ended_here}


def _signal(ranks: dict[int, int], exits: dict[int, tuple[int, float]], kind: signal.Signals) -> None:
    for rank, pid in ranks.items():
        if rank not in exits:
            os.kill(pid, kind)


if __name__ == "__main__":
    serve(sys.argv[1])
