"""The one decision: what is chosen, what is refused, what is printed."""

import os
import subprocess
import sys

import pytest
import torch

from nemo_opt import cpu, device
from nemo_opt.errors import ConfigError


@pytest.fixture
def decide(monkeypatch):
    """`decide(request, gpus=1)`: a fresh decision on a machine with that many GPUs."""

    def decide(request=None, *, gpus=0, engine=None):
        if request is None:
            monkeypatch.delenv(device.DEVICE_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(device.DEVICE_VARIABLE, request)
        monkeypatch.setattr(device, "_cuda_is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: engine)
        device.choose_device.cache_clear()
        return device.choose_device()

    yield decide
    monkeypatch.undo()
    device.choose_device.cache_clear()


def test_without_a_gpu_it_is_the_cpu(decide):
    choice = decide()
    assert (choice.type, choice.backend, choice.dtype, choice.transformer_engine) == ("cpu", "gloo", torch.float32, "reference")
    assert "no GPU" in choice.reason or "without CUDA" in choice.reason
    assert device.default_spec() == "te"
    assert device.local_device() == torch.device("cpu")


@pytest.mark.parametrize(("engine", "expected", "spec"), [(None, "none", "local"), (object(), "real", "te")])
def test_with_gpus_it_is_cuda_and_the_transformer_engine_there_is(decide, engine, expected, spec, monkeypatch):
    choice = decide(gpus=2, engine=engine)
    assert (choice.type, choice.backend, choice.dtype, choice.transformer_engine) == ("cuda", "nccl", torch.bfloat16, expected)
    assert "2 GPU" in choice.reason
    assert device.default_spec() == spec
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.local_device() == torch.device("cuda", 1)


def test_cpu_can_be_asked_for_beside_gpus(decide):
    choice = decide("CPU", gpus=2)
    assert choice.type == "cpu"
    assert choice.reason == "NEMO_OPT_DEVICE=cpu"


def test_cuda_that_is_not_there_is_refused(decide):
    with pytest.raises(ConfigError, match=r"NEMO_OPT_DEVICE=cuda, but .*; unset it"):
        decide("cuda")


def test_unknown_request_is_refused(decide):
    with pytest.raises(ConfigError, match=r"'tpu' is unknown; set it to 'cuda' or 'cpu'"):
        decide("tpu", gpus=1)


def test_choice_says_what_and_why(decide):
    assert str(decide("cpu")) == "cpu with gloo, the CPU backend, float32: NEMO_OPT_DEVICE=cpu"
    assert str(decide(gpus=1)).startswith("cuda with nccl, no Transformer Engine, bfloat16")


def test_activation_on_cuda_leaves_the_process_alone(decide, monkeypatch):
    monkeypatch.setattr(cpu, "activate", lambda: pytest.fail("the CPU backend was activated beside CUDA"))
    decide(gpus=1)
    assert device.activate(announce=False).type == "cuda"


def test_activation_is_idempotent_and_announced_once_on_rank_0(decide, capsys, monkeypatch):
    decide("cpu")
    monkeypatch.setenv("RANK", "1")
    device._announce.cache_clear()
    device.activate()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    device._announce.cache_clear()
    assert device.activate() == device.activate()
    assert capsys.readouterr().err == f"nemo_opt: {device.choose_device()}\n"
    assert cpu.is_active()


def test_importing_the_module_loads_no_torch():
    code = "import sys, nemo_opt.device; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "COVERAGE_PROCESS_START": ""}, timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("driver", "request_", "expected"), [(True, "", True), (True, "cuda", True), (True, " CPU", False), (False, "", False)]
)
def test_whether_ranks_will_look_for_a_gpu(monkeypatch, driver, request_, expected):
    monkeypatch.setattr(device.Path, "exists", lambda path: driver and str(path) == "/dev/nvidiactl")
    monkeypatch.setenv(device.DEVICE_VARIABLE, request_)
    assert device.expects_gpu() == expected
