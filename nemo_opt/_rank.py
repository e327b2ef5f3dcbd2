"""One rank of a job: `python -m nemo_opt._rank JOB_DIRECTORY`, started by `nemo_opt.launch` or forked for it, never by a person."""

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from nemo_opt import launch, stacks
from nemo_opt.errors import NemoOptError

__all__ = ["die_with_parent", "live", "main", "quiet_upstream"]

_PR_SET_PDEATHSIG = 1


def main(job: Path) -> int:
    """Runs the job that `run_ranks` described in `job`; returns the exit code."""
    try:
        description = json.loads((job / "job.json").read_text())
        result = launch.resolve(description["target"])(**launch.decode(description["kwargs"]))
        if launch.rank() == 0:
            launch.write_result(job, result)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # noqa: BLE001  everything is reported to the parent
        launch.write_failure(job, error, traceback.format_exc())
        return 2 if isinstance(error, NemoOptError) else 1
    return 0


def quiet_upstream() -> None:
    """Upstream's import-time notices (Apex is not installed, ...) bury what a command says; NEMO_OPT_WARNINGS=1 shows them."""
    if not os.environ.get("NEMO_OPT_WARNINGS"):
        warnings.filterwarnings("ignore", module=r"(megatron|modelopt|torch|transformers)\b")
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on every machine without


def die_with_parent() -> None:
    """A killed parent must not leave ranks behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def live(job: Path) -> NoReturn:
    """The life of this process as a rank of `job`."""
    faulthandler.enable()
    stacks.keep(job, launch.rank())
    die_with_parent()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a rank that is killed leaves behind
    code = main(job)
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter teardown with live process groups and their threads can hang after a failure; nothing is left to clean up.
    os._exit(code)


if __name__ == "__main__":
    quiet_upstream()
    live(Path(sys.argv[1]))
