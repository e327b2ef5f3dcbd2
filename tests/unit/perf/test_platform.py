import re
import subprocess
from pathlib import Path

import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf import platform as module
from nemo_opt.perf.platform import environment, platform_key

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: {model}
model name\t: Intel(R) Xeon(R) Processor @ 2.30GHz
cpu MHz\t\t: {mhz}

processor\t: 1
model\t\t: 1
"""


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """`cpu(text)` makes this a machine without GPUs of that /proc/cpuinfo."""
    monkeypatch.setattr(module, "expects_gpu", lambda: False)
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    return (tmp_path / "cpuinfo").write_text


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(name, ...)` makes this a machine with these GPUs."""

    def make(*names):
        monkeypatch.setattr(module, "expects_gpu", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        done = subprocess.CompletedProcess([], 0, stdout="".join(f"{name}\n" for name in names))
        monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)

    return make


def test_key_is_a_folder_name_and_repeats():
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", platform_key())
    assert platform_key() == platform_key()


def test_key_does_not_know_the_clock(cpu):
    cpu(INTEL.format(model=207, mhz="2300.000"))
    first = platform_key()
    cpu(INTEL.format(model=207, mhz="3187.412"))
    assert platform_key() == first
    assert "intel-r-xeon-r-processor-f6m207" in first
    assert "ghz" not in first


def test_key_tells_generations_of_one_name_apart(cpu):
    cpu(INTEL.format(model=207, mhz="2300"))
    first = platform_key()
    cpu(INTEL.format(model=143, mhz="2300"))
    assert platform_key() != first


def test_key_tells_numbers_of_cores_apart(cpu, monkeypatch):
    cpu(INTEL.format(model=207, mhz="2300"))
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert platform_key().endswith("-3-cores")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0})
    assert platform_key().endswith("-1-cores")


def test_processor_without_a_name_is_told_by_its_numbers(cpu):
    cpu("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    assert "0x41-0xd4f" in platform_key()


def test_key_of_gpus_is_their_kind_and_number(gpus, monkeypatch):
    gpus("NVIDIA H200", "NVIDIA H200")
    assert platform_key() == "nvidia-h200-x2"
    gpus("NVIDIA H200", "NVIDIA L4")
    assert platform_key() == "nvidia-h200-x1-nvidia-l4-x1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert platform_key() == "nvidia-l4-x1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a")
    assert platform_key() == "nvidia-h200-x1"


def test_hidden_gpus_leave_a_cpu(gpus, monkeypatch):
    gpus("NVIDIA H200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert platform_key().endswith("cores")


@pytest.mark.parametrize("error", [FileNotFoundError("none"), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_driver_that_does_not_answer_is_an_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, "expects_gpu", lambda: True)
    monkeypatch.setattr(module.subprocess, "run", fail)
    with pytest.raises(DataError, match="nvidia-smi"):
        platform_key()


def test_environment_is_text_with_versions(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    facts = environment()
    assert all(isinstance(fact, str) for fact in facts.values())
    assert facts["numpy"]
    assert facts["torch"]
    assert facts["kernel"]
    assert facts["OMP_NUM_THREADS"] == "3"
    assert facts["MALLOC_ARENA_MAX"] == ""
    assert int(facts["memory GiB"]) > 0
    assert facts == environment()


def test_files_that_are_not_there_are_empty_facts(monkeypatch):
    monkeypatch.setattr(module, "_MEMINFO", Path("/nowhere/meminfo"))
    assert environment()["memory GiB"] == ""
