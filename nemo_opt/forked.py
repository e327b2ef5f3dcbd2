"""Asks a fork server, where one is named, to start the ranks of a job: they skip the 9 to 18 s that importing the stack takes.

`NEMO_OPT_FORK_SERVER` names its socket; the functional suite sets it (`nemo_opt.testing.fork_server`). Ranks get this process's
environment, directory and standard streams. A server that was started under other settings of those read at import is not used: then
ranks start by themselves. Loads no torch.
"""

import json
import os
import socket
import sys
from pathlib import Path

from nemo_opt.errors import NemoOptError

__all__ = ["SOCKET_ENV", "ForkServerError", "import_settings", "run_forked"]

SOCKET_ENV = "NEMO_OPT_FORK_SERVER"

type Exits = dict[int, tuple[int, float]]
"""Exit code of each rank, negative for a signal, and when it was noticed."""

_READ_AT_IMPORT = ("NEMO_OPT_DEVICE", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "NEMO_OPT_CPU_DEVICES")
_CONNECT_TIMEOUT_S = 10.0


class ForkServerError(NemoOptError):
    """The fork server that the environment names does not answer as it should."""


def import_settings() -> dict[str, str | None]:
    """What a process must have in common with the server for a fork of that to be what it would start itself."""
    return {"python": sys.executable, **{name: os.environ.get(name) for name in _READ_AT_IMPORT}}


def run_forked(job: Path, devices: int) -> Exits | None:
    """Runs the job of `nemo_opt.launch` on forked ranks, until all have ended; None where there is no server for it.

    When this process dies or is interrupted, the server ends the ranks.

    Raises:
        ForkServerError: the server that is named is gone, or breaks off.

    """
    address = os.environ.get(SOCKET_ENV)
    if not address:
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(_CONNECT_TIMEOUT_S)
            connection.connect(address)
            request = {
                "job": str(job),
                "devices": devices,
                "cwd": str(Path.cwd()),
                "environment": dict(os.environ),
                "needs": import_settings(),
            }
            message = json.dumps(request).encode()
            socket.send_fds(connection, [len(message).to_bytes(8)], [0, 1, 2])
            connection.sendall(message)
            connection.settimeout(None)  # the job takes as long as it takes; a dead server closes the connection
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except OSError as error:
            raise ForkServerError(f"the fork server at {address} does not answer ({error}): start it, or unset {SOCKET_ENV}") from None
    if not answer:
        raise ForkServerError(
            f"the fork server at {address} broke off: its log may say why; without {SOCKET_ENV} ranks start by themselves"
        )
    exits = json.loads(answer)["exits"]
    return None if exits is None else {int(rank): (int(code), float(noticed)) for rank, (code, noticed) in exits.items()}
