"""Sends `device="cuda"` in every spelling to main memory.

Decision: the functions that take a device are wrapped one by one, instead of entering a `TorchFunctionMode`. A mode costs 1.5 us on every
operation of a training step, belongs to one thread, and is absent in Python backwards and inside its own handler; a wrapper costs
about 0.3 us on the factories only and holds everywhere. `torch.device("cuda")` objects stay what they are; they are understood
where they are used. What `.cuda()` returns is the tensor itself, as on a GPU for a tensor that is there already.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _device as torch_device_context

from nemo_opt.cpu.devices import CPU, names_cuda
from nemo_opt.cpu.patches import set_attribute

__all__ = ["install", "suspended"]

_FACTORIES = (
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_like", "empty_permuted", "empty_quantized",
    "empty_strided", "eye", "full", "full_like", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal",
    "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor",
    "sparse_bsc_tensor", "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor", "sparse_csr_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_TYPES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")

_redirects: list[tuple[Any, str, Any, Any]] = []  # owner, name, PyTorch's own, the redirected one


def install() -> None:
    """Wraps the factories, the tensor methods and the remaining entries that take a device."""
    torch_device_context._device_constructors()  # cached now: `with torch.device(...)` must go on recognising the originals
    for name in _FACTORIES:
        _wrap_factory(torch, name)
    for name in _METHODS:
        _wrap_factory(torch.Tensor, name)
    for name in ("fftfreq", "rfftfreq"):
        _wrap_factory(torch.fft, name)
    _wrap_tensor_methods()
    _wrap_contexts()
    set_attribute(torch, "Generator", _generator_class())
    for name in _TYPES:
        set_attribute(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    torch.serialization.register_package(0, _no_location, _keep_in_memory)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """PyTorch's own functions for a while, to measure what the redirects cost."""
    for owner, name, original, _ in _redirects:
        setattr(owner, name, original)
    try:
        yield
    finally:
        for owner, name, _, redirected in _redirects:
            setattr(owner, name, redirected)


def _redirect(owner: Any, name: str, redirected: Any) -> None:
    _redirects.append((owner, name, getattr(owner, name), redirected))
    set_attribute(owner, name, redirected)


def _wrap_factory(owner: Any, name: str) -> None:
    if not hasattr(owner, name):  # torch.range and the like may go; a factory that is not there needs no redirect
        return
    original = getattr(owner, name)

    @functools.wraps(original)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and names_cuda(device):
                kwargs["device"] = CPU
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    builtin = torch.jit._builtins._find_builtin(original)
    if builtin is not None:
        torch.jit._builtins._register_builtin(redirected, builtin)
    _redirect(owner, name, redirected)


def _wrap_tensor_methods() -> None:
    to, to_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def redirected_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and names_cuda(args[0]):
            args = (CPU, *args[1:])
        elif kwargs and names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    @functools.wraps(to_type)
    def redirected_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return to_type(self, dtype, *args, **kwargs) if dtype is not None else to_type(self)

    def cuda(self: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = torch.preserve_format) -> Any:
        return to(self, CPU, memory_format=memory_format) if isinstance(self, torch.Tensor) else self

    def same(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    def nothing(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Main memory is not handed out by streams, so there is nothing to record."""

    methods = {"to": redirected_to, "type": redirected_type, "cuda": cuda, "pin_memory": same, "record_stream": nothing}
    for name, method in methods.items():
        _redirect(torch.Tensor, name, method)
    for storage in (torch.UntypedStorage, torch.TypedStorage):
        _redirect(storage, "cuda", cuda)
        _redirect(storage, "pin_memory", same)


def _wrap_contexts() -> None:
    """`with torch.device("cuda")`, `torch.set_default_device("cuda")` and `torch.autocast("cuda")`."""
    context, autocast = torch_device_context.DeviceContext, torch.autocast
    enter_context, enter_autocast = context.__init__, autocast.__init__
    outside = torch.get_autocast_dtype("cuda")  # what autocast("cuda") computes in unless an outer one says otherwise

    @functools.wraps(enter_context)
    def context_init(self: Any, device: Any) -> None:
        enter_context(self, CPU if names_cuda(device) else device)

    @functools.wraps(enter_autocast)
    def autocast_init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type = "cpu"
            dtype = dtype or (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else outside)
        enter_autocast(self, device_type, dtype, enabled, *args, **kwargs)

    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        _wrap_autocast_question(name)
    _redirect(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu"))
    _redirect(context, "__init__", context_init)
    _redirect(autocast, "__init__", autocast_init)


def _wrap_autocast_question(name: str) -> None:
    """Asked about CUDA, or about no device, the answer is what holds for the operations that are computed."""
    original = getattr(torch, name)

    @functools.wraps(original)
    def redirected(device_type: str = "cuda") -> Any:
        return original("cpu" if device_type == "cuda" else device_type)

    _redirect(torch, name, redirected)


def _generator_class() -> type:
    """A stand-in for `torch.Generator` that makes real generators, on the CPU."""
    real = torch.Generator

    class Meta(type(real)):  # type: ignore[misc]
        def __call__(cls, device: Any = CPU) -> torch.Generator:
            return real(CPU if names_cuda(device) else device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, real)

    return Meta("Generator", (real,), {"__module__": "torch", "__doc__": real.__doc__})


def _no_location(storage: Any) -> None:
    """Claims no storage for saving: everything that is saved lies on the CPU."""


def _keep_in_memory(storage: Any, location: str) -> Any:
    """Restores what was saved from a GPU, or is asked to go to one, into main memory."""
    return storage if location.startswith("cuda") else None
