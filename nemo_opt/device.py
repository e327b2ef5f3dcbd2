"""The one place that decides device, backend, dtype and Transformer Engine, and says why.

The decision is made once for a process: CUDA with NCCL where PyTorch finds a GPU, otherwise the CPU backend with gloo. `NEMO_OPT_DEVICE`
(`cuda` or `cpu`) overrides it; a request that cannot be met is an error, never a silent fallback. float32 on the CPU: bfloat16 is about
ten times slower there.
"""

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemo_opt.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICE_VARIABLE", "DeviceChoice", "activate", "choose_device", "default_spec", "expects_gpu", "local_device"]

DEVICE_VARIABLE = "NEMO_OPT_DEVICE"


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """What this process computes on."""

    type: Literal["cuda", "cpu"]
    """Where tensors live."""
    backend: Literal["nccl", "gloo"]
    """The torch.distributed backend."""
    dtype: "torch.dtype"
    """The dtype models are built in unless another is asked for."""
    transformer_engine: Literal["real", "reference", "none"]
    """NVIDIA's own, the CPU backend's reference, or none."""
    reason: str
    """Why, in words for the user."""

    def __str__(self) -> str:
        engine = {"real": "Transformer Engine", "reference": "the CPU backend", "none": "no Transformer Engine"}[self.transformer_engine]
        return f"{self.type} with {self.backend}, {engine}, {str(self.dtype).removeprefix('torch.')}: {self.reason}"


@functools.cache
def choose_device() -> DeviceChoice:
    """Decides, once for this process.

    Raises:
        ConfigError: `NEMO_OPT_DEVICE` asks for something unknown, or for a GPU that is not there.
    """
    import torch

    wanted = os.environ.get(DEVICE_VARIABLE, "").strip().lower()
    if wanted not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE_VARIABLE}={wanted!r} is unknown; set it to 'cuda' or 'cpu', or leave it unset")
    available = _cuda_is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(f"{DEVICE_VARIABLE}=cuda, but {_why_no_cuda()}; unset it, or set it to 'cpu'")
    if available and wanted != "cpu":
        engine: Literal["real", "none"] = "real" if importlib.util.find_spec("transformer_engine") else "none"
        reason = f"{torch.cuda.device_count()} GPU(s) found"
        return DeviceChoice(type="cuda", backend="nccl", dtype=torch.bfloat16, transformer_engine=engine, reason=reason)
    reason = f"{DEVICE_VARIABLE}=cpu" if wanted == "cpu" else _why_no_cuda()
    return DeviceChoice(type="cpu", backend="gloo", dtype=torch.float32, transformer_engine="reference", reason=reason)


def activate(announce: bool = True) -> DeviceChoice:
    """Puts the choice in place for this process; a second call does nothing more.

    Args:
        announce: Whether rank 0 prints the choice, once, to stderr.

    Raises:
        ConfigError: The request cannot be met.
        UpstreamMovedError: The CPU backend does not fit the installed Megatron-Core or ModelOpt.
    """
    choice = choose_device()
    if choice.type == "cpu":
        from nemo_opt import cpu

        cpu.activate()
    if announce:
        _announce()
    return choice


def expects_gpu() -> bool:
    """Whether ranks will look for a GPU here: there is NVIDIA's driver, and the CPU is not asked for. Loads no torch."""
    return Path("/dev/nvidiactl").exists() and os.environ.get(DEVICE_VARIABLE, "").strip().lower() != "cpu"


def local_device() -> "torch.device":
    """The device of this rank: the GPU numbered LOCAL_RANK, or the CPU."""
    import torch

    if choose_device().type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def default_spec() -> Literal["te", "local"]:
    """The layer spec to use unless another is asked for: Transformer Engine's, where any Transformer Engine is."""
    return "local" if choose_device().transformer_engine == "none" else "te"


def _cuda_is_available() -> bool:
    """Whether PyTorch finds a real GPU; the CPU backend's pretended devices are none."""
    import torch

    from nemo_opt import cpu

    return not cpu.is_active() and torch.cuda.is_available()


def _why_no_cuda() -> str:
    import torch

    return "PyTorch finds no GPU" if torch.version.cuda else "this PyTorch is built without CUDA"


@functools.cache
def _announce() -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"nemo_opt: {choose_device()}", file=sys.stderr)
