"""The functions of `torch.cuda`, answered for main memory.

Memory figures are those of the process: "allocated" is its resident memory, "max allocated" its highest resident memory since the last
reset. Both are measured, though they hold more than tensors. The device's properties name the processor; its compute capability is 8.0,
the level of what the backend offers (bfloat16, but no FP8 matrix products in hardware).
"""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_opt.cpu import devices, rng
from nemo_opt.cpu.patches import set_attribute, set_functions

__all__ = ["install"]

_CAPABILITY = (8, 0)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """There is nothing to wait for, to empty, to initialise or to profile."""


def _lazy_call(function: Callable[[], Any], **kwargs: Any) -> None:
    function()


class _Device:
    """`torch.cuda.device(i)` and `torch.cuda.device_of(tensor)`: another current device for a while."""

    def __init__(self, device: Any) -> None:
        self.idx = devices.current_device() if isinstance(device, torch.Tensor) else devices.index_of(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = devices.current_device()
        rng.set_device(self.idx)

    def __exit__(self, *exception: object) -> None:
        rng.set_device(self.prev_idx)


def _status_bytes(key: str) -> int:
    """A figure of /proc/self/status, in bytes; 0 where the system has no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _memory_allocated(device: Any = None) -> int:
    return _status_bytes("VmRSS")


def _max_memory_allocated(device: Any = None) -> int:
    return _status_bytes("VmHWM")


def _reset_peak(device: Any = None) -> None:
    """Makes the present resident memory the highest one; the kernel offers that for one's own process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = _memory_allocated(), _max_memory_allocated()
    stats = {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "reserved", "active")
        for when, value in (("current", now), ("peak", peak))
    }
    return stats | {"num_alloc_retries": 0, "num_ooms": 0}


def _memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    return f"resident memory of the process: {_memory_allocated()} bytes, at most {_max_memory_allocated()} since the last reset"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return free, _total_memory()


def _device_name(device: Any = None) -> str:
    return f"{platform.processor() or platform.machine()} (nemo_opt CPU backend)"


def _device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name=_device_name(),
        major=_CAPABILITY[0],
        minor=_CAPABILITY[1],
        total_memory=_total_memory(),
        multi_processor_count=os.cpu_count() or 1,
        warp_size=1,
        is_integrated=True,
        is_multi_gpu_board=False,
        L2_cache_size=0,
        gcnArchName="",
    )


class CUDAGraph:
    """Stands for `torch.cuda.CUDAGraph` and says at once that it cannot be had."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA graphs cannot be captured on the CPU backend; switch them off (Megatron-Core: cuda_graph_impl='none')")


@contextlib.contextmanager
def _nvtx_range(message: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _current_accelerator(check_available: bool = False) -> torch.device | None:
    return torch.device("cuda") if devices.device_count() or not check_available else None


def _accelerator_functions() -> dict[str, Any]:
    """`torch.accelerator`, PyTorch's device-neutral form of the same questions."""
    functions: dict[str, Any] = {
        "is_available": lambda: devices.device_count() > 0,
        "device_count": devices.device_count,
        "current_accelerator": _current_accelerator,
        "current_device_index": devices.current_device,
        "current_device_idx": devices.current_device,
        "set_device_index": rng.set_device,
        "set_device_idx": rng.set_device,
        "device_index": _Device,
        "synchronize": _nothing,
        "current_stream": torch.cuda.current_stream,
        "set_stream": torch.cuda.set_stream,
        "empty_cache": _nothing,
        "memory_allocated": _memory_allocated,
        "memory_reserved": _memory_allocated,
        "max_memory_allocated": _max_memory_allocated,
        "max_memory_reserved": _max_memory_allocated,
        "memory_stats": _memory_stats,
        "reset_peak_memory_stats": _reset_peak,
        "get_memory_info": _mem_get_info,
    }
    return {name: function for name, function in functions.items() if hasattr(torch.accelerator, name)}  # younger than torch.cuda


def install() -> None:
    """Replaces the functions of `torch.cuda`; the streams must be in place."""
    replacements: dict[str, Any] = {
        "is_available": lambda: devices.device_count() > 0,
        "device_count": devices.device_count,
        "current_device": devices.current_device,
        "set_device": rng.set_device,
        "device": _Device,
        "device_of": _Device,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": _lazy_call,
        "is_initialized": lambda: devices.device_count() > 0,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "memory_allocated": _memory_allocated,
        "memory_reserved": _memory_allocated,
        "max_memory_allocated": _max_memory_allocated,
        "max_memory_reserved": _max_memory_allocated,
        "reset_peak_memory_stats": _reset_peak,
        "reset_max_memory_allocated": _reset_peak,
        "reset_accumulated_memory_stats": _nothing,
        "memory_stats": _memory_stats,
        "memory_summary": _memory_summary,
        "memory_snapshot": lambda *args, **kwargs: [],
        "mem_get_info": _mem_get_info,
        "device_memory_used": _memory_allocated,
        "get_device_name": _device_name,
        "get_device_properties": _device_properties,
        "get_device_capability": lambda device=None: _CAPABILITY,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    set_functions(torch.cuda, replacements)
    set_attribute(torch.cuda, "CUDAGraph", CUDAGraph)
    for name in filter(replacements.__contains__, torch.cuda.memory.__all__):
        set_attribute(torch.cuda.memory, name, getattr(torch.cuda, name))
    set_functions(torch.cuda.profiler, {"start": _nothing, "stop": _nothing})
    set_functions(torch.accelerator, _accelerator_functions())
    set_functions(torch.cuda.nvtx, {"range_push": lambda msg: 0, "range_pop": lambda: 0, "mark": _nothing, "range": _nvtx_range})
