"""Hosts are threads here, with one store; tests/functional/L2_TwoNodes_Distill.sh takes real ones away."""

import os
import socket
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist

from nemo_opt import hosts
from nemo_opt.hosts import Watch, _Heard, _verdict

INTERVAL_S = 0.02
LIMIT_S = 30 * INTERVAL_S


@pytest.fixture
def start():
    """Starts the watch of a host; what it reports as lost is in `.said`."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []

    def one(host, *, hosts, name, client=lambda store: store):
        said = []
        watch = Watch(
            lambda: client(dist.TCPStore("127.0.0.1", server.port, is_master=False)),
            host,
            hosts,
            name=name,
            lost=said.append,
            interval_s=INTERVAL_S,
            limit_s=LIMIT_S,
        )
        watch.said = said
        started.append(watch)
        return watch

    yield one
    for watch in started:
        watch.stop()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


class TestTorchrunsJob:
    """What `watch` reads from the environment that torchrun gives its ranks."""

    @pytest.fixture
    def started(self, monkeypatch):
        """The watches that were started, which watch nothing."""
        found = []
        monkeypatch.setattr(hosts, "Watch", lambda *args, **kwargs: found.append((args, kwargs)) or MagicMock())
        monkeypatch.setattr(hosts.atexit, "register", lambda _: None)
        for name, value in {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "RANK": "2"}.items():
            monkeypatch.setenv(name, value)
        return found

    @pytest.mark.parametrize(("ranks", "name"), [("2", "ranks 2 to 3"), ("1", "rank 2")])
    def test_the_first_rank_of_a_host_watches_for_all_of_it(self, started, monkeypatch, ranks, name):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert hosts.watch(7.0) is not None
        ((_, host, count), settings) = started[0]
        assert (host, count, settings["limit_s"]) == (1, 2, 7.0)
        assert settings["name"] == f"{socket.gethostname()} ({name})"

    @pytest.mark.parametrize(("variable", "value"), [("GROUP_WORLD_SIZE", "1"), ("LOCAL_RANK", "1")])
    def test_nobody_else_does(self, started, monkeypatch, variable, value):
        monkeypatch.setenv(variable, value)
        assert hosts.watch() is None
        assert not started

    def test_the_store_is_that_of_the_agent(self, monkeypatch):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.port))
        hosts._connect().set("key", "value")
        assert server.get("key") == b"value"

    def test_what_is_lost_is_said_and_ends_the_rank(self, monkeypatch, capsys):
        codes = []
        monkeypatch.setattr(hosts.os, "_exit", codes.append)
        hosts._end("host b (rank 1) was lost")
        assert codes == [1]
        assert capsys.readouterr().err == f"nemo_opt: host b (rank 1) was lost; {socket.gethostname()} ends\n"


class Fragile:
    """A client of the store that fails from the moment it is told to."""

    def __init__(self, store):
        self.store, self.broken = store, False

    def __getattr__(self, name):
        if self.broken:
            raise dist.DistNetworkError("Broken pipe")
        return getattr(self.store, name)


def test_a_silent_host_is_named_and_no_other(start):
    clients = []

    def fragile(store):
        clients.append(Fragile(store))
        return clients[-1]

    here = start(0, hosts=3, name="node-6 (ranks 0 to 7)")
    start(1, hosts=3, name="node-7 (ranks 8 to 15)", client=fragile)
    start(2, hosts=3, name="node-8 (ranks 16 to 23)")
    wait_for(lambda: {1, 2} <= here._heard.keys())
    clients[0].broken = True
    wait_for(lambda: here.said)
    assert here.said[0].startswith("host node-7 (ranks 8 to 15) was lost: no sign of it for ")
    assert "node-8" not in here.said[0]


def test_a_store_that_does_not_answer_names_its_host(start):
    clients = []

    def fragile(store):
        clients.append(Fragile(store))
        return clients[-1]

    start(0, hosts=2, name="node-6 (rank 0)")
    here = start(1, hosts=2, name="node-7 (rank 1)", client=fragile)
    wait_for(lambda: here._heard)
    clients[0].broken = True
    wait_for(lambda: here.said)
    assert here.said[0].startswith("host node-6 (rank 0) was lost: the store on it has not answered for ")


def test_a_host_that_ends_in_order_says_so(start):
    here, there = start(0, hosts=2, name="node-6"), start(1, hosts=2, name="node-7")
    wait_for(lambda: here._heard and there._heard)
    there.stop()
    wait_for(lambda: here._heard[1].beat == "bye")
    assert here.said == []


ALIVE = {1: _Heard("8", "node-7", time_s=99.0)}


@pytest.mark.parametrize(
    ("heard", "round_s", "now_s", "named"),
    [
        (ALIVE, 100.0, 101.0, []),
        (ALIVE, 100.0, 129.0, []),
        (ALIVE, 125.0, 129.5, ["node-7"]),
        (ALIVE | {2: _Heard("3", "node-8", 97.0), 3: _Heard("5", "node-9", 120.0)}, 125.0, 129.5, ["node-7", "node-8"]),
        ({1: _Heard("bye", "node-7", 10.0)}, 125.0, 129.5, []),
        ({0: _Heard("8", "node-6", 99.0)} | ALIVE, 99.0, 131.0, ["node-6"]),
        (ALIVE, 99.0, 131.0, ["of rank 0"]),
        ({}, None, 500.0, []),
        ({}, 499.0, 500.0, []),
    ],
    ids=["alive", "late", "silent", "two silent", "ended in order", "store silent", "store never heard of", "not begun", "alone"],
)
def test_who_is_lost(heard, round_s, now_s, named):
    message = _verdict(heard, round_s, now_s, limit_s=30.0)
    assert [part.split(" was lost")[0].removeprefix("host ") for part in message.split("; ") if part] == named


@pytest.mark.parametrize("environment", [{}, {"GROUP_WORLD_SIZE": "1"}, {"GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
def test_a_single_host_and_further_ranks_watch_nothing(monkeypatch, environment):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.watch() is None


def run(*arguments):
    command = [sys.executable, "-m", "nemo_opt.hosts", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"GROUP_WORLD_SIZE": "1"})


def test_a_module_runs_as_a_program_with_its_arguments():
    done = run("--limit", "15", "-m", "calendar", "2026", "11")
    assert done.returncode == 0
    assert "November 2026" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "the following arguments are required: -m"),
        (["-m"], "name a module after -m"),
        (["--limit", "3", "-m", "calendar"], "--limit 3 must be above the 3 s between two beats"),
    ],
)
def test_other_commands_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        hosts.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
