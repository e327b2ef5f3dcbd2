"""Which machine this is, and what on it may explain a change of its figures.

Decisions:
- The key is made of facts that stay: device, CPU, cores. Measured clock rates jitter, and a key of them splits a series or mixes two.
- Whatever can change on the same machine (versions, kernel, driver, settings) is environment: recorded beside the figures, not in the key.
- Where there is a driver but no answer from it, that is an error: figures of a GPU must not lie among those of the CPU.
- All names of the environment are always recorded, empty for what is not there, so that one that appears is a change.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from nemo_opt.device import expects_gpu
from nemo_opt.errors import DataError

__all__ = ["environment", "platform_key"]

_TIMEOUT_S = 30.0
"""Of nvidia-smi, which takes seconds where the driver is not kept loaded."""

_PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "numpy", "transformer-engine", "triton")

_SETTINGS = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")

_CPUINFO, _MEMINFO, _QUOTA = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/sys/fs/cgroup/cpu.max")


def platform_key() -> str:
    """The name of this machine's folder of history, such as `x86-64-intel-r-xeon-r-processor-f6m207-2-cores` or `nvidia-h200-x1`.

    Raises:
        DataError: There is a driver of NVIDIA's, but nvidia-smi does not answer.

    """
    gpus = _visible(_ask_gpus("name")) if expects_gpu() else []
    if gpus:
        kinds = sorted(set(gpus))
        return _slug(" ".join(f"{kind} x{gpus.count(kind)}" for kind in kinds))
    return _slug(f"{platform.machine()} {_cpu_model(_text(_CPUINFO))} {len(os.sched_getaffinity(0))} cores")


def environment() -> dict[str, str]:
    """Versions and settings that explain a change, by name; empty for what is not there."""
    facts = {"python": platform.python_version()}
    facts |= {name: _version(name) for name in _PACKAGES}
    facts |= {"kernel": platform.release(), "glibc": platform.libc_ver()[1], "driver": _driver()}
    facts |= {name: os.environ.get(name, "") for name in _SETTINGS}
    facts |= {"cpu quota": _text(_QUOTA).strip(), "memory GiB": _memory_gib(_text(_MEMINFO))}
    return facts


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_model(cpuinfo: str) -> str:
    """The name, with family and model where they are told: virtual machines call many generations `Intel(R) Xeon(R) Processor`."""
    facts = dict(re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", cpuinfo.split("\n\n", 1)[0], flags=re.MULTILINE))
    name = facts.get("model name") or " ".join(facts.get(part, "") for part in ("CPU implementer", "CPU part")).strip()
    # Some names end in a clock rate: the nominal one, yet not worth a doubt.
    name = re.sub(r"@.*", "", name)
    family = f" f{facts['cpu family']}m{facts['model']}" if {"cpu family", "model"} <= facts.keys() else ""
    return f"{name or platform.processor() or 'unknown cpu'}{family}"


def _memory_gib(meminfo: str) -> str:
    found = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, flags=re.MULTILINE)
    return str(round(int(found[1]) / 2**20)) if found else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    return next(iter(_ask_gpus("driver_version")), "") if expects_gpu() else ""


def _ask_gpus(what: str) -> list[str]:
    """One answer for each GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"NVIDIA's driver is here, but {' '.join(command)} fails: {error}; set NEMO_OPT_DEVICE=cpu to ignore it") from error
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _visible(gpus: list[str]) -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves; names that are no numbers only tell how many."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if all(name.isdigit() and int(name) < len(gpus) for name in names):
        return [gpus[int(name)] for name in names]
    return gpus[: len(names)]
