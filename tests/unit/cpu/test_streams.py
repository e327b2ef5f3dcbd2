"""Streams and events: which stream is current, and measured times."""

import threading
import time

import pytest
import torch

from nemo_opt import device

device.activate(announce=False)


def test_current_stream_follows_the_context():
    default = torch.cuda.default_stream()
    assert torch.cuda.current_stream() is default
    outer, inner = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
    assert outer.cuda_stream != inner.cuda_stream
    with torch.cuda.stream(outer):
        assert torch.cuda.current_stream() is outer
        with inner:
            assert torch.cuda.current_stream() is inner
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() is outer
        assert torch.cuda.current_stream() is outer
    assert torch.cuda.current_stream() is default
    torch.cuda.set_stream(outer)
    assert torch.cuda.current_stream() is outer
    torch.cuda.set_stream(default)
    assert torch.cuda.current_stream() is default
    assert torch.cuda.default_stream("cuda:1") is not default


def test_each_thread_has_its_own_current_stream():
    seen = []
    with torch.cuda.stream(torch.cuda.Stream()):
        worker = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        worker.start()
        worker.join(timeout=30)
    assert seen == [torch.cuda.default_stream()]


def test_work_on_a_stream_is_done_when_it_is_waited_for():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = torch.ones(4).cumsum(0)
        event = stream.record_event()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().wait_event(event)
    event.wait()
    event.synchronize()
    stream.synchronize()
    assert event.query()
    assert stream.query()
    assert result.tolist() == [1, 2, 3, 4]
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.Stream.priority_range() == (0, 0)


def test_elapsed_time_is_measured_in_milliseconds():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    before = time.perf_counter()
    time.sleep(0.02)
    slept_ms = (time.perf_counter() - before) * 1000
    end.record()
    assert slept_ms <= start.elapsed_time(end) < slept_ms + 20  # another process may take the core in between


def test_elapsed_time_needs_two_recorded_events_with_timing():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="must be recorded"):
        start.elapsed_time(end)
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        start.elapsed_time(torch.cuda.Event())
