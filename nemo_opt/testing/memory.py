"""How much memory a call needs beside what is there, on a GPU and without one.

On the CPU that is the process's resident memory, which tells what tensors need only where freed pages go back to the system: glibc is told
so, as it does where nothing is set. Time and memory are therefore measured apart, time first: with these settings page faults count.
"""

import ctypes
from collections.abc import Callable

import nemo_opt._stack

import torch

__all__ = ["extra_bytes"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_THRESHOLD = 2**17  # bytes; glibc's own default


def extra_bytes(call: Callable[[], object]) -> int:
    """Allocated memory of this rank at its highest while `call` runs, less that before. Freed pages are returned from now on."""
    _return_freed_pages()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _return_freed_pages() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(option, _THRESHOLD)
        libc.malloc_trim(0)
