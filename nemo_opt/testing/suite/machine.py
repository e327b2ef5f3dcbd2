"""What scripts can run on here: cores, GPUs, memory; found without loading torch."""

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nemo_opt.testing.suite.script import Script

__all__ = ["Machine"]

_GIB = 1 << 30
_PROBE_TIMEOUT_S = 20.0
_DEVICE_ENV, _VISIBLE_ENV = "NEMO_OPT_DEVICE", "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine, and what is wanted of it."""

    device: str
    """What is wanted: cpu, cuda, or empty for whatever is there."""
    cores: int
    """That this process may use."""
    gpus: tuple[str, ...]
    """Their names in CUDA_VISIBLE_DEVICES; empty where the CPU is wanted."""
    memory_gib: float
    """That is free now."""

    @classmethod
    def here(cls, device: str | None = None) -> "Machine":
        """What is here.

        Args:
            device: Wanted: cpu or cuda; `NEMO_OPT_DEVICE`, or whatever is there, by default.

        """
        wanted = device or os.environ.get(_DEVICE_ENV, "")
        gpus = () if wanted == "cpu" else _gpus()
        return cls(device=wanted, cores=len(os.sched_getaffinity(0)), gpus=gpus, memory_gib=_free_memory_gib())

    @property
    def used(self) -> str:
        """What ranks will compute on: cpu or cuda."""
        return "cuda" if self.gpus or self.device == "cuda" else "cpu"

    @property
    def places(self) -> int:
        """Ranks that fit at once: one for each GPU, or else for each core."""
        return len(self.gpus) or self.cores

    def lacks(self, script: Script) -> str:
        """Why the script cannot run here; empty if it can."""
        if "cuda" in (script.device, self.device) and not self.gpus:
            return "no CUDA device here"
        if script.device == "cpu" and self.gpus:
            return f"only without CUDA (--device cpu, or {_DEVICE_ENV}=cpu)"
        if self.gpus and script.ranks > len(self.gpus):
            return f"needs {script.ranks} GPUs, {len(self.gpus)} here"
        if script.memory_gib > self.memory_gib:
            return f"needs {script.memory_gib:g} GiB of memory, {self.memory_gib:.1f} free here"
        return _no_namespaces() if "namespaces" in script.needs else ""

    def environment(self, gpus: tuple[str, ...] = ()) -> dict[str, str]:
        """What a script's environment must say, for the wanted device and on `gpus` where it has some of its own."""
        return ({_DEVICE_ENV: self.device} if self.device else {}) | ({_VISIBLE_ENV: ",".join(gpus)} if gpus else {})


@cache
def _no_namespaces() -> str:
    """Why hosts of their own, joined by a virtual cable, cannot be made here; empty if they can."""
    own = () if os.getuid() == 0 else ("--user", "--map-root-user")
    cable = ("ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
    command = ["unshare", *own, "--net", "--uts", "--pid", "--fork", "--mount-proc", *cable]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespaces here: {error}"
    return f"no network namespaces here: {tried.stderr.strip() or tried.returncode}" if tried.returncode else ""


def _gpus() -> tuple[str, ...]:
    """Those of the driver, or those of them that the environment leaves visible."""
    if not Path("/dev/nvidiactl").exists():
        return ()
    if (visible := os.environ.get(_VISIBLE_ENV)) is not None:
        return tuple(name for name in visible.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


def _free_memory_gib() -> float:
    """Of the machine, or of the container where that may use less."""
    group = Path("/sys/fs/cgroup")
    free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        used = _numbers(group / "memory.stat")
        free = min(free, int(most) - used["anon"] - used["shmem"])  # what is cached can be had
    return free / _GIB


def _numbers(table: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for line in table.read_text().splitlines() if len(words := line.split()) > 1}
