"""torch.cuda answers: true where a figure is asked for, empty where there is nothing to do."""

import numpy as np
import pytest
import torch

from nemo_opt import device
from nemo_opt.cpu import devices

device.activate(announce=False)


@pytest.fixture
def pretended():
    devices.pretend(2)
    yield 2
    torch.cuda.set_device(0)
    devices.pretend(0)


def test_as_a_backend_no_gpu_is_claimed():
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert torch.cuda.current_device() == 0


def test_pretended_devices_are_counted_and_chosen(pretended):
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == pretended
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        with torch.cuda.device("cuda:0"):
            assert torch.cuda.current_device() == 0
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    torch.cuda.set_device(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 1


def test_device_that_is_not_there_is_refused(pretended):
    with pytest.raises(RuntimeError, match=r"invalid device ordinal \(2 of 2"):
        torch.cuda.set_device(2)


def test_memory_figures_are_those_of_the_process():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block = np.ones(64 << 20, dtype=np.uint8)
    assert torch.cuda.memory_allocated() - before > 50 << 20
    del block
    # glibc returns a block of this size to the system at once
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() > 50 << 20
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory
    stats = torch.cuda.memory_stats()
    assert 0 < stats["allocated_bytes.all.current"] <= stats["allocated_bytes.all.peak"]


def test_properties_name_the_processor():
    properties = torch.cuda.get_device_properties("cuda")
    assert "CPU backend" in properties.name == torch.cuda.get_device_name()
    assert (properties.major, properties.minor) == torch.cuda.get_device_capability() == (8, 0)


def test_nothing_to_wait_for_and_nothing_to_initialise():
    torch.cuda.synchronize("cuda:0")
    torch.cuda.empty_cache()
    torch.cuda.init()
    called = []
    torch.cuda._lazy_call(lambda: called.append(True))
    assert called == [True]


def test_accelerator_gives_the_same_answers(pretended):
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == pretended
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("cuda")
    torch.accelerator.set_device_index(1)
    assert torch.accelerator.current_device_index() == torch.cuda.current_device() == 1
    assert torch.accelerator.current_stream() is torch.cuda.current_stream()
    torch.accelerator.synchronize()
    devices.pretend(0)
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_optimizers_step_on_pretended_devices(pretended, optimizer, options):
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    stepping = optimizer([weight], lr=0.5, **options)
    scaler.scale(weight.sum()).backward()
    scaler.step(stepping)
    scaler.update()
    assert weight.grad.tolist() == [1.0, 1.0]
    assert (weight < 0.51).all()  # both optimizers go a whole learning rate down for a gradient of one


def test_data_loader_that_pins_memory_delivers(pretended):
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2, pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_memory_module_answers_like_the_package():
    assert torch.cuda.memory.memory_allocated() > 0
    assert "resident memory" in torch.cuda.memory_summary()
    assert torch.cuda.memory_snapshot() == []


def test_cuda_graphs_are_refused_at_once():
    with pytest.raises(RuntimeError, match="cannot be captured on the CPU backend"):
        torch.cuda.CUDAGraph()


def test_nvtx_ranges_are_silent():
    torch.cuda.nvtx.range_push("a")
    torch.cuda.nvtx.range_pop()
    with torch.cuda.nvtx.range("a {}", 1):
        torch.cuda.nvtx.mark("here")


@pytest.mark.parametrize(("value", "expected"), [(None, 0), (-1, 0), ("cuda", 0), ("cuda:2", 2), (3, 3), (torch.device("cuda", 1), 1)])
def test_device_arguments_have_an_index(value, expected):
    assert devices.index_of(value) == expected


@pytest.mark.parametrize("value", ["cpu", "meta", None, True, 1.5, torch.device("cpu"), torch.float32])
def test_what_names_no_cuda_device(value):
    assert not devices.names_cuda(value)
