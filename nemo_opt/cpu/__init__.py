"""The CPU backend: Megatron-Core and ModelOpt without a GPU.

`activate()` changes this process: CUDA devices that are asked for mean main memory, NCCL means gloo, `transformer_engine` means the
pure-torch reference of this package, and the places of Megatron-Core and ModelOpt that insist on CUDA are patched by name. It fakes no
result: every operation is computed, `Tensor.is_cuda` stays False, figures are measured.

Known only to `nemo_opt.device`, and to whoever runs `python -m nemo_opt.cpu`.
"""

import importlib
import os

from nemo_opt.errors import ConfigError

__all__ = ["DEVICES_VARIABLE", "activate", "is_active"]

DEVICES_VARIABLE = "NEMO_OPT_CPU_DEVICES"  # set by `python -m nemo_opt.cpu`: the number of pretended devices

_PATCH_MODULES = ("nemo_opt.cpu.megatron", "nemo_opt.cpu.modelopt")  # importing them registers their patches

_active = False


def is_active() -> bool:
    """Whether the backend is in place in this process."""
    return _active


def activate() -> None:
    """Puts the backend in place; a second call does nothing.

    Raises:
        ConfigError: CUDA is in use in this process already.
        UpstreamMovedError: A patch found its target gone or changed.
    """
    global _active
    if _active:
        return
    import torch

    if torch.cuda.is_initialized():
        raise ConfigError("the CPU backend was asked for, but this process uses CUDA already; choose the device before the first tensor")
    from nemo_opt.cpu import collectives, cuda, devices, patches, redirect, rng, streams, transformer_engine

    for name in _PATCH_MODULES:
        importlib.import_module(name)
    devices.pretend(int(os.environ.get(DEVICES_VARIABLE, "0")))
    for part in (redirect, rng, streams, cuda, collectives):
        part.install()
    transformer_engine.install()
    patches.install()
    _active = True
