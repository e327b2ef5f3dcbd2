"""How much memory a call's tensors need beside what is there, on a GPU and without one.

Decisions:
- Tensors are counted and not pages of the process: the same number on every run, and what a GPU's allocator counts as well. What libraries
  keep for themselves is not in it.
- On the CPU they are those that PyTorch's profiler sees. It does not follow blocks that were there before: freeing one inside the call
  makes no room.
"""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import nemo_opt._stack

import torch
from torch.profiler import ProfilerActivity, profile

from nemo_opt.device import choose_device

__all__ = ["extra_bytes"]

_QUIET = {"KINETO_LOG_LEVEL": "99"}
"""Or the profiler tells of its starts on the error stream."""


def extra_bytes(call: Callable[[], object]) -> int:
    """Bytes of this rank's tensors at their highest while `call` runs, less those before."""
    if choose_device().type == "cpu":
        return _profiled(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _profiled(call: Callable[[], object]) -> int:
    os.environ.update(_QUIET)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory(prefix="nemo_opt_memory_") as folder:
        place = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(place))
        events = json.loads(place.read_text(encoding="utf-8"))["traceEvents"]
    of_memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    # Not the total that each event tells: it goes on from what the last call has left, whatever became of that since.
    return max(accumulate(event["args"]["Bytes"] for event in of_memory), default=0)
