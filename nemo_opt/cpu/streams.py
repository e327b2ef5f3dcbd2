"""Streams and events on a processor that finishes each operation before the next one starts.

Waiting is therefore always satisfied, and `Event.query()` is truly True; what remains to be kept is which stream is current, and the
moments at which events were recorded, so that `elapsed_time` is a measured time.
"""

import threading
import time
from typing import Any, Self

import torch

from nemo_opt.cpu import devices
from nemo_opt.cpu.patches import set_functions

__all__ = ["Event", "Stream", "install"]


class Stream:
    """Stands for `torch.cuda.Stream`: an ordering that holds by itself."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cuda", devices.index_of(device))
        self.device_index, self.device_type = self.device.index, 1
        self.priority = priority
        Stream._made += 1
        self.stream_id = self.cuda_stream = Stream._made
        self._before: list[Stream] = []

    def wait_stream(self, stream: Any) -> None:
        """Waits for work that is already done."""

    def wait_event(self, event: "Event") -> None:
        """Waits for an event that has already happened, if it was recorded."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Records the present moment, in a new event if none is given."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Returns at once: the work is done."""

    def query(self) -> bool:
        """Whether all work is done; it is."""
        return True

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured; never. PyTorch's optimizers ask at each step."""
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority; there is only one."""
        return 0, 0

    def __enter__(self) -> Self:
        self._before.append(_current_stream())
        _set_stream(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _set_stream(self._before.pop())


class Event:
    """Stands for `torch.cuda.Event`: a moment on the process's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **kwargs: Any) -> None:
        self.enable_timing = enable_timing
        self.time_s: float | None = None

    def record(self, stream: Any = None) -> None:
        """Takes the time."""
        self.time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Returns at once: what was before the event is done."""

    def synchronize(self) -> None:
        """Returns at once: what was before the event is done."""

    def query(self) -> bool:
        """Whether what was before the event is done; it is."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event to another.

        Raises:
            RuntimeError: As CUDA does, if either event was not recorded or made without timing.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.time_s is None or end_event.time_s is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event.time_s - self.time_s) * 1000


class _StreamContext:
    """`torch.cuda.stream(stream)`; None leaves the current stream."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            self.stream.__exit__()


_default: dict[int, Stream] = {}
_current = threading.local()  # .stream: the stream that a thread chose, if it chose one


def _default_stream(device: Any = None) -> Stream:
    index = devices.index_of(device)
    if index not in _default:
        _default[index] = Stream(index)
    return _default[index]


def _current_stream(device: Any = None) -> Stream:
    chosen = getattr(_current, "stream", None)
    return chosen if chosen is not None and device is None else _default_stream(device)


def _set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _current.stream = None if stream is _default_stream(stream.device) else stream


def install() -> None:
    """Replaces the stream functions and classes of `torch.cuda`."""
    replacements: dict[str, Any] = {
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "StreamContext": _StreamContext,
        "current_stream": _current_stream,
        "default_stream": _default_stream,
        "set_stream": _set_stream,
        "is_current_stream_capturing": lambda: False,
    }
    set_functions(torch.cuda, replacements)
