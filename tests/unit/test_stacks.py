"""A job that SIGTERM ends shows where every rank was; `testing/test_fork_server.py` has the same for forked ranks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nemo_opt import forked, stacks

TARGETS = '''
import os, threading, time

def wait(folder, value=None):
    """Hangs: rank 0 in one function, others in another, with a thread beside them."""
    threading.Thread(target=beside, daemon=True).start()
    open(f"{folder}/ready-{os.environ.get('RANK', '0')}", "w").close()
    receive_nothing() if os.environ.get("RANK", "0") == "0" else send_nothing()

def receive_nothing():
    threading.Event().wait(60)

def send_nothing():
    time.sleep(60)

def beside():
    time.sleep(60)
'''


def ended(folder, devices, *, group):
    """What a client says that is told to end while its ranks hang, alone or with its whole process group, and how long that took."""
    code = (
        "import sys\n"
        "from nemo_opt.cli.run import exit_code_of\n"
        "from nemo_opt.launch import run_ranks\n"
        f"sys.exit(exit_code_of(lambda: run_ranks('stuck_targets:wait', {{'folder': {str(folder)!r}}}, devices={devices})))"
    )
    (folder / "stuck_targets.py").write_text(TARGETS)
    environment = os.environ | {"PYTHONPATH": str(folder), "NEMO_OPT_DEVICE": "cpu", forked.SOCKET_ENV: ""}
    client = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in range(devices)):
        assert time.monotonic() < deadline
        assert client.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # from that file to the function that hangs
    start = time.monotonic()
    (os.killpg if group else os.kill)(client.pid, signal.SIGTERM)
    _, said = client.communicate(timeout=30)
    return client.returncode, said, time.monotonic() - start


@pytest.mark.ranks
@pytest.mark.parametrize("group", [False, True], ids=["alone", "with its group"])
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_every_ranks_stack_is_shown(tmp_path, devices, group):
    code, said, time_s = ended(tmp_path, devices, group=group)
    assert code == 1
    assert time_s < 10
    assert "ended by SIGTERM, while its ranks were here:" in said
    for rank in range(devices):
        _, _, rest = said.partition(f"--- rank {rank}\n")
        stack = rest.partition("--- rank")[0]
        assert "in receive_nothing" in stack if rank == 0 else "in send_nothing" in stack
        assert "in beside" in stack


def test_a_rank_that_wrote_nothing_is_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "_WAIT_S", 0.05)
    (tmp_path / "stacks-1.txt").write_text("Thread 1:\n  in f\n")
    assert stacks.read(tmp_path, 2) == "--- rank 0\nnot known\n--- rank 1\nThread 1:\n  in f"


def test_long_stacks_keep_their_end(tmp_path):
    (tmp_path / "stacks-0.txt").write_text("\n".join(map(str, range(100))))
    lines = stacks.read(tmp_path, 1).splitlines()
    assert lines[1] == "(40 lines left out)"
    assert (lines[2], lines[-1], len(lines)) == ("40", "99", 62)


def terminate_this():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)  # Python runs handlers between two instructions


class TestTerminable:
    def test_the_signal_is_an_exception_and_the_default_returns(self):
        with pytest.raises(stacks.TerminatedError), stacks.terminable():
            terminate_this()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_a_second_signal_does_not_break_the_first(self):
        with stacks.terminable():
            with pytest.raises(stacks.TerminatedError):
                terminate_this()
            terminate_this()

    def test_a_handler_of_the_users_stays(self):
        seen = []
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        try:
            with stacks.terminable():
                terminate_this()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert seen == [1]

    def test_other_threads_leave_signals_alone(self):
        done = []

        def use():
            with stacks.terminable():
                done.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert done == [signal.SIG_DFL]


def test_nothing_is_kept_of_ranks_that_end_by_themselves(tmp_path):
    """The file is in the job's directory, which goes with the job."""
    code = "from nemo_opt.launch import run_ranks; print(run_ranks('json:dumps', {'obj': 1}))"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), forked.SOCKET_ENV: ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n"
    assert not list(temporary.iterdir())
