"""What a script may run on: a GPU that is not there makes it not run, never passed on something else."""

import re
from pathlib import Path

import pytest

from nemo_opt.testing.suite import machine as module
from nemo_opt.testing.suite.machine import Machine
from nemo_opt.testing.suite.script import Script


def script(**settings):
    words = {"path": Path("L2_A.sh"), "tier": "L2", "ranks": 2, "timeout_s": 1, "device": "any", "needs": (), "owner": "@x"}
    return Script(**words | settings)


def machine(**settings):
    return Machine(**{"device": "", "cores": 2, "gpus": (), "memory_gib": 8.0} | settings)


@pytest.mark.parametrize(
    ("there", "needed", "lack"),
    [
        ({}, {}, ""),
        ({}, {"ranks": 4}, ""),
        ({}, {"device": "cpu"}, ""),
        ({}, {"device": "cuda"}, "no CUDA device here"),
        ({"device": "cpu"}, {"device": "cuda"}, "no CUDA device here"),
        ({"device": "cuda"}, {}, "no CUDA device here"),
        ({"gpus": ("0", "1")}, {}, ""),
        ({"gpus": ("0", "1"), "device": "cuda"}, {"device": "cuda"}, ""),
        ({"gpus": ("0", "1")}, {"device": "cpu"}, "only without CUDA"),
        ({"gpus": ("0",)}, {}, "needs 2 GPUs, 1 here"),
        ({}, {"memory_gib": 8.5}, "needs 8.5 GiB of memory, 8.0 free here"),
        ({}, {"memory_gib": 8.0}, ""),
    ],
)
def test_lacks(there, needed, lack):
    found = machine(**there).lacks(script(**needed))
    assert found.startswith(lack)
    assert bool(found) == bool(lack)


def test_what_is_used():
    assert (machine().used, machine().places) == ("cpu", 2)
    there = machine(gpus=("3", "5", "7"), device="cuda")
    assert (there.used, there.places) == ("cuda", 3)
    assert machine(device="cuda").used == "cuda", "which is wanted, and missing"
    assert there.environment(("5",)) == {"NEMO_OPT_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "5"}
    assert machine().environment() == {}


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "nvidia0", path / "nvidia1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module._gpus() == ("0", "1")
    for visible, expected in (("", ()), ("-1", ()), ("1", ("1",)), ("GPU-a,GPU-b", ("GPU-a", "GPU-b"))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert module._gpus() == expected
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert module._gpus() == ()


def test_here(monkeypatch):
    monkeypatch.setattr(module, "_gpus", lambda: ("0",))
    monkeypatch.delenv("NEMO_OPT_DEVICE", raising=False)
    found = Machine.here()
    assert (found.device, found.gpus) == ("", ("0",))
    assert found.cores >= 1
    assert 0 < found.memory_gib < 1e5
    assert Machine.here("cpu").gpus == ()
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    assert Machine.here().gpus == ()
    assert Machine.here("cuda").gpus == ("0",)


def test_memory_of_a_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n",
        "/sys/fs/cgroup/memory.max": str(5 << 30),
        "/sys/fs/cgroup/memory.stat": f"anon {1 << 30}\nfile {3 << 30}\nshmem {1 << 29}\n",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert module._free_memory_gib() == 3.5
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert module._free_memory_gib() == 8.0


@pytest.mark.parametrize(
    ("command", "lack"),
    [
        ("exit 0", ""),
        ("echo 'Operation not permitted' >&2; exit 1", "no network namespaces here: Operation not permitted"),
        ("exit 3", "no network namespaces here: 3"),
        (None, "no network namespaces here: .*unshare.*"),
    ],
)
def test_namespaces_are_tried(monkeypatch, tmp_path, command, lack):
    """By the command that would make them, since what permits them differs from machine to machine."""
    if command is not None:
        (tmp_path / "unshare").write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    module._no_namespaces.cache_clear()
    try:
        assert re.fullmatch(lack, machine().lacks(script(needs=("namespaces",))))
        assert machine().lacks(script(needs=("fixtures",))) == ""
    finally:
        module._no_namespaces.cache_clear()
