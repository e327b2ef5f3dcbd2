"""Jobs on forked ranks end as those that `launch` starts itself do (tests/unit/test_launch.py); only sooner."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nemo_opt import forked, launch
from nemo_opt.errors import ConfigError
from nemo_opt.launch import RankFailedError, run_ranks
from nemo_opt.testing import fork_server, ranks

TARGETS = """
import os, signal, sys, time
import nemo_opt.errors


def facts(value):
    import torch

    print("said by a rank", flush=True)
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MY_SETTING")
    facts = {"value": value, "cwd": os.getcwd(), "threads": torch.get_num_threads(), "parent": os.getppid()}
    return facts | {name: os.environ.get(name) for name in names}


def reduce():
    import torch, torch.distributed as dist
    from nemo_opt.parallel import Topology, parallel

    with parallel(Topology()):
        x = torch.ones(2) * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return x.tolist()


def misbehave(how):
    if os.environ.get("RANK", "1") == "1":
        if how == "refuse":
            raise nemo_opt.errors.ConfigError("tp 3 does not fit")
        if how == "crash":
            1 / 0
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leave":
            os._exit(7)
    time.sleep(60)


def wait(folder, stubborn):
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(f"{folder}/{os.environ['RANK']}.pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def server():
    """A server forked from the one of the test ranks, which has imported the stack; yields its address and the folder of the targets."""
    with tempfile.TemporaryDirectory(prefix="nemo_opt_test_") as folder:
        Path(folder, "forked_targets.py").write_text(TARGETS)
        address = f"{folder}/socket"
        code = f"import sys; sys.path.insert(0, {folder!r}); from nemo_opt.testing.fork_server import serve; serve({address!r})"
        ranks.prepare()
        process = ranks._context.Process(target=exec, args=(code, {}), daemon=True)
        process.start()
        deadline = time.monotonic() + ranks.START_TIMEOUT_S
        while not Path(address).exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield address, folder
        process.kill()
        process.join()


@pytest.fixture
def job(server, monkeypatch):
    """`job(function, devices=2, **kwargs)` on the server; the environment is one that it can serve."""
    monkeypatch.setenv(forked.SOCKET_ENV, server[0])
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def run(name, devices=2, **kwargs):
        return run_ranks(f"forked_targets:{name}", kwargs, devices=devices)

    return run


pytestmark = pytest.mark.ranks


def test_ranks_get_what_the_caller_has(job, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("MY_SETTING", "mine")
    monkeypatch.chdir(tmp_path)
    result = job("facts", value=[1, "two"])
    assert result == {"value": [1, "two"], "cwd": str(tmp_path), "threads": 1, "RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                      "MY_SETTING": "mine", "parent": result["parent"]}  # fmt: skip
    assert result["parent"] != os.getpid()
    assert capfd.readouterr().out.count("said by a rank") == 2


def test_one_rank_has_all_cores_and_no_world(job):
    result = job("facts", devices=1, value=None)
    assert (result["RANK"], result["WORLD_SIZE"]) == (None, None)
    assert result["threads"] == len(os.sched_getaffinity(0))


def test_ranks_meet_again_and_again(job):
    assert [job("reduce", devices=size) for size in (2, 2, 3)] == [[3.0, 3.0], [3.0, 3.0], [6.0, 6.0]]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("refuse", ConfigError, r"^tp 3 does not fit$"),
        ("crash", RankFailedError, r"(?s)rank 1 failed:\nTraceback.*in misbehave.*ZeroDivisionError"),
        ("die", RankFailedError, "rank 1 was ended by SIGKILL"),
        ("leave", RankFailedError, "without a message.*rank 1: exit 7"),
    ],
)
def test_the_first_failure_ends_all_and_is_named(job, how, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        job("misbehave", how=how)
    assert time.monotonic() - start < 30, "the other rank sleeps for 60 s: it must have been ended"
    assert job("reduce") == [3.0, 3.0]


@pytest.mark.parametrize("stubborn", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_ranks_end_with_who_asked_for_them(server, tmp_path, stubborn):
    """Even those that ignore SIGTERM, once their grace is over."""
    address, _ = server
    arguments = {"folder": str(tmp_path), "stubborn": stubborn}
    code = f"from nemo_opt.launch import run_ranks; run_ranks('forked_targets:wait', {arguments}, devices=2)"
    client = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {forked.SOCKET_ENV: address})
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.kill()
    client.wait()
    pids = [int(file.read_text()) for file in files]
    deadline = time.monotonic() + launch.SHUTDOWN_TIMEOUT_S + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their client"
        time.sleep(0.1)


def test_a_client_that_is_told_to_end_shows_where_its_ranks_were(server, tmp_path):
    address, _ = server
    arguments = {"folder": str(tmp_path), "stubborn": False}
    code = f"from nemo_opt.launch import run_ranks; run_ranks('forked_targets:wait', {arguments}, devices=2)"
    environment = os.environ | {forked.SOCKET_ENV: address}
    client = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"{rank}.pid").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    client.terminate()
    _, said = client.communicate(timeout=30)
    assert "ended by SIGTERM, while its ranks were here:" in said
    for rank in range(2):
        assert "in wait" in said.partition(f"--- rank {rank}\n")[2].partition("--- rank")[0]


def test_a_server_with_other_settings_is_not_used(job, monkeypatch):
    """Devices are chosen at import: the ranks are then started without it, here as a child that cannot find the targets."""
    monkeypatch.setenv("NEMO_OPT_CPU_DEVICES", "3")
    assert forked.run_forked(Path("unused"), 1) is None
    with pytest.raises(RankFailedError, match="No module named 'forked_targets'"):
        job("facts", devices=1, value=1)


def test_without_a_server_nothing_is_asked(monkeypatch):
    monkeypatch.delenv(forked.SOCKET_ENV, raising=False)
    assert forked.run_forked(Path("unused"), 2) is None


@pytest.mark.parametrize("listens", [False, True])
def test_a_server_that_is_gone_or_breaks_off_is_an_error(monkeypatch, tmp_path, listens):
    address = tmp_path / "socket"
    server = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(address)!r}); s.listen(); s.accept()[0].recv(8)"
    process = subprocess.Popen([sys.executable, "-c", server if listens else f"open({str(address)!r}, 'w')"])
    while not address.exists():
        time.sleep(0.02)
    time.sleep(0.1)
    monkeypatch.setenv(forked.SOCKET_ENV, str(address))
    with pytest.raises(forked.ForkServerError, match=f"the fork server at {address} .*{forked.SOCKET_ENV}"):
        run_ranks("json:dumps", {"obj": 1}, devices=2)
    process.wait()


def test_a_server_that_cannot_start_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(forked.ForkServerError, match="ended with exit code 1"), fork_server.ForkServer(tmp_path / "log"):
        pass
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # waits for an address that it takes for a file
    with pytest.raises(forked.ForkServerError, match=r"(?s)ended with exit code 1.*cat: "), fork_server.ForkServer(tmp_path / "log"):
        pass


def test_a_server_that_is_late_is_ended(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    start = time.monotonic()
    with pytest.raises(forked.ForkServerError, match="is not ready"), fork_server.ForkServer(tmp_path / "log", start_timeout_s=0.2):
        pass
    assert time.monotonic() - start < 10
