"""python -m nemo_opt.cpu [--devices N] (SCRIPT | -m MODULE) ARGS...: runs a program that was written for GPUs, unchanged.

The program is told that it has N GPUs (`torch.cuda.is_available()` is True, `torch.cuda.device_count()` is N); what it does on them it
does in main memory, NCCL is gloo, and Transformer Engine is the pure-torch reference. The processes it spawns run the same way. No
result is faked: `Tensor.is_cuda` is False, and a program that checks it is told so.

CUDA's compiler is hidden (CUDA_HOME, CUDA_PATH), because ModelOpt builds CUDA extensions as soon as a GPU is announced. Python
processes started with -E or -I ignore PYTHONPATH and run without the backend.

For instance:
  python -m nemo_opt.cpu train.py --steps 10
  python -m nemo_opt.cpu --devices 8 -m pytest tests/gpu -x
  python -m nemo_opt.cpu --devices 2 -m torch.distributed.run --nproc-per-node 2 train.py
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_opt.cpu import DEVICES_VARIABLE

__all__ = ["main"]

_SITE = Path(__file__).parent / "_site"
_DEVICES_HELP = "how many GPUs the program is told it has (default here: %(default)s, one for each core, at most 8)"


def main(argv: Sequence[str] | None = None) -> None:
    """Replaces this process by the program's; returns only if that is impossible."""
    devices, program = _parse(sys.argv[1:] if argv is None else argv)
    os.execve(sys.executable, [sys.executable, *program], _environment(devices))  # noqa: S606 (a program is what this is for)


def _parse(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The number of devices, and the arguments for Python: all from the script or -m on."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m nemo_opt.cpu",
        usage="python -m nemo_opt.cpu [--devices N] (SCRIPT | -m MODULE) ARGS...",
        description=summary.partition(": ")[2],
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--devices", type=int, default=_default_devices(), metavar="N", help=_DEVICES_HELP)
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ...", help="run a module as a program")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="run a script")
    options = parser.parse_args(argv)
    if options.devices < 1:
        parser.error(f"--devices {options.devices}: at least one device is needed")
    if options.module:
        return options.devices, ["-m", *options.module]
    if not options.script:
        parser.error("name a SCRIPT or -m MODULE to run")
    if not Path(options.script[0]).is_file():
        parser.error(f"{options.script[0]}: no such script")
    return options.devices, options.script


def _environment(devices: int) -> dict[str, str]:
    """The environment in which every Python process finds the backend."""
    hidden = {"CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    path = [str(_SITE), *filter(None, [environment.get("PYTHONPATH")])]
    chosen = {"CUDA_VISIBLE_DEVICES": "", DEVICES_VARIABLE: str(devices), "NEMO_OPT_DEVICE": "cpu"}
    return environment | {"PYTHONPATH": os.pathsep.join(path)} | chosen


def _default_devices() -> int:
    """One for each processor core, and at most the eight of a usual node."""
    return max(1, min(8, os.cpu_count() or 1))


if __name__ == "__main__":
    main()
