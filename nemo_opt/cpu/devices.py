"""The pretended devices: which values name one, how many there are, which one is current.

Two modes. As a backend (`nemo_opt.device`), `torch.cuda.is_available()` keeps answering False and there are no devices to count: that is
the truth, and ModelOpt compiles CUDA extensions as soon as it hears otherwise. Under `python -m nemo_opt.cpu` a program written for N
GPUs is told that it has them. In both modes a CUDA device that is asked for means main memory.
"""

from typing import Any

import torch

__all__ = ["CPU", "current_device", "device_count", "index_of", "names_cuda", "pretend", "set_current_device"]

CPU = torch.device("cpu")

_count = 0
_current = 0


def names_cuda(value: Any) -> bool:
    """Whether a `device=` argument (a string, an index or a `torch.device`) asks for a CUDA device."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, int) and not isinstance(value, bool)


def pretend(count: int) -> None:
    """Announces `count` devices through `torch.cuda.device_count()`; 0 announces none."""
    global _count
    _count = count


def device_count() -> int:
    """The number of announced devices."""
    return _count


def current_device() -> int:
    """The current device's index; 0 until a program chooses another."""
    return _current


def set_current_device(index: int) -> None:
    """Makes a device current.

    Raises:
        RuntimeError: Devices are announced and this one is not among them (CUDA's own message, which programs look for).
    """
    global _current
    if _count and not 0 <= index < _count:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {_count} pretended devices)")
    _current = index


def index_of(device: Any = None) -> int:
    """The index that a device argument means; None, -1 and a device without an index mean the current one."""
    if device is None or (isinstance(device, int) and device < 0):
        return _current
    if isinstance(device, int):
        return device
    index = torch.device(device).index if isinstance(device, str | torch.device) else None
    return _current if index is None else index
