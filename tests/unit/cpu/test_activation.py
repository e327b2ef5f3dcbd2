"""Activation: explicit, once, and never beside CUDA."""

import subprocess
import sys

import pytest
import torch

from nemo_opt import cpu, device
from nemo_opt.cpu import redirect
from nemo_opt.errors import ConfigError


def test_a_second_activation_changes_nothing():
    device.activate(announce=False)
    before = torch.zeros, torch.Tensor.to, torch.cuda.current_device, torch.distributed.new_group, len(redirect._redirects)
    cpu.activate()
    assert (torch.zeros, torch.Tensor.to, torch.cuda.current_device, torch.distributed.new_group, len(redirect._redirects)) == before
    assert cpu.is_active()


def test_a_process_that_uses_cuda_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_active", False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="uses CUDA already; choose the device before"):
        cpu.activate()
    assert not cpu.is_active()


def test_importing_the_package_activates_nothing():
    code = "import sys, nemo_opt.cpu; sys.exit(nemo_opt.cpu.is_active() or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_what_is_suspended_comes_back():
    device.activate(announce=False)
    redirected = torch.ones
    with redirect.suspended():
        assert torch.ones is not redirected
        assert torch.ones(2).tolist() == [1.0, 1.0]
    assert torch.ones is redirected
    assert torch.ones(2, device="cuda").tolist() == [1.0, 1.0]
