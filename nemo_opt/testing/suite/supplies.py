"""What scripts need from outside, and whether it is still there when one has failed: fixtures, the fork server, room on the disk."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from nemo_opt.errors import CheckpointError, NemoOptError
from nemo_opt.forked import SOCKET_ENV
from nemo_opt.launch import RankFailedError
from nemo_opt.testing import fixtures
from nemo_opt.testing.fork_server import ForkServer
from nemo_opt.testing.suite.script import Script

__all__ = ["LEAST_FREE_BYTES", "Supplies"]

LEAST_FREE_BYTES = 16 << 20
"""Less is a full disk: a checkpoint of the fixtures takes 4 MB."""


class Supplies(ExitStack):
    """Started before the first script, ended after the last.

    Args:
        logs: Where the fork server's log goes, and where there must be room.
        forking: Whether there shall be a fork server.

    """

    def __init__(self, logs: Path, *, forking: bool) -> None:
        super().__init__()
        self._logs, self._forking = logs, forking
        self._no_server = ""
        self._no_fixtures = ""
        self._fixtures: fixtures.Fixtures | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        if self._forking:
            try:
                named = self.enter_context(ForkServer(self._logs / "fork_server.log"))
            except NemoOptError as error:
                self._no_server = f"no fork server: {error}"
            else:
                self.callback(os.environ.pop, SOCKET_ENV, None)
                os.environ.update(named)  # for this process, which makes fixtures, and for scripts
        return self

    def make_fixtures(self, scripts: Iterable[Script]) -> None:
        """Makes them, or finds them in the cache, where one of `scripts` needs them."""
        if not self._no_server and any("fixtures" in script.needs for script in scripts):
            try:
                self._fixtures = fixtures.build()
            except (NemoOptError, RankFailedError, OSError) as error:
                self._no_fixtures = f"no fixtures: {error}"

    def missing(self, script: Script) -> str:
        """What the script would lack; empty if nothing."""
        return self._no_server or (self._no_fixtures if "fixtures" in script.needs else "")

    def damage(self, script: Script) -> str:
        """What was damaged while the script ran, of which its verdict says nothing; empty if nothing."""
        if self._fixtures is None or "fixtures" not in script.needs:
            return ""
        try:
            self._fixtures.verify()
        except (CheckpointError, OSError) as error:
            return f"fixtures were damaged while it ran: {error}"
        return ""

    def loss(self) -> str:
        """What is gone that may be why a script failed; empty if nothing is. Later scripts do without a server that is gone."""
        for place in (self._logs, Path(tempfile.gettempdir())):
            if (free := shutil.disk_usage(place).free) < LEAST_FREE_BYTES:
                return f"the disk is full: {free} bytes free for {place}"
        address = os.environ.get(SOCKET_ENV) if self._forking else None
        if address and not _listens(address):
            os.environ.pop(SOCKET_ENV, None)
            return f"the fork server is gone: {self._logs / 'fork_server.log'} may say why; later scripts start ranks by themselves"
        return ""


def _listens(address: str) -> bool:
    """Whether a process holds the socket; asked with a socket of another type, which that process does not notice."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
    return False
