"""What all modules with weights share: tensor-parallel state, initialisation of weights, the extra state of checkpoints."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_opt.errors import ConfigError

__all__ = [
    "TransformerEngineBaseModule",
    "activation_dtype",
    "cast",
    "get_dummy_wgrad",
    "resolve_device",
    "set_tensor_parallel_attributes",
]

InitMethod = Callable[[torch.Tensor], Any]
"""Fills a tensor in place."""

_DEFAULT_INIT: InitMethod = partial(torch.nn.init.normal_, mean=0.0, std=0.023)
"""Transformer Engine's own default when the caller gives no `init_method`."""


def resolve_device(device: Any) -> torch.device:
    """The device of new parameters: "meta" is honoured; whatever names a GPU means the CPU, where this reference computes."""
    return torch.device("meta") if str(device) == "meta" else torch.device("cpu")


def activation_dtype(module: str, inp: torch.Tensor, *parameters: torch.Tensor | None) -> torch.dtype:
    """The type to compute in: autocast's if that is on, else the common type of the input and the parameters.

    Raises:
        ConfigError: the types differ outside autocast, as Transformer Engine refuses too.
    """
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    for parameter in parameters:
        if parameter is not None and parameter.numel() and parameter.dtype != inp.dtype:
            raise ConfigError(
                f"{module}: the input is {inp.dtype} but a parameter is {parameter.dtype}. Outside torch.autocast they must be equal: "
                f"cast the input, or build the module with params_dtype={inp.dtype}."
            )
    return inp.dtype


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a type; itself where it has that type."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def set_tensor_parallel_attributes(tensor: torch.Tensor, is_parallel: bool, dim: int, stride: int = 1) -> None:
    """Mark how a parameter is cut across tensor-parallel ranks, in the attributes Megatron-Core reads."""
    for name, value in (("tensor_model_parallel", is_parallel), ("partition_dim", dim), ("partition_stride", stride)):
        setattr(tensor, name, value)


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A stand-in gradient for a weight whose real gradient went into `main_grad`; its values are never read."""
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of the modules with weights.

    `_extra_state` holds FP8 scales in Transformer Engine. Here FP8 is off, so it is an empty byte tensor; a non-empty one that comes with
    a checkpoint from an FP8 run is kept as it is and written out again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_initialized = False
        self.primary_weights_in_fp8 = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None, "recipe": None}
        self.tp_group: ProcessGroup | None = None
        self.tp_size = 1
        self.sequence_parallel = False
        self._inits: dict[str, InitMethod] = {}
        self._get_rng_state_tracker: Callable[[], Any] | None = None
        self._extra_state = torch.empty(0, dtype=torch.uint8)

    def set_tensor_parallel_group(self, tp_group: ProcessGroup | None) -> None:
        """Set the ranks among which the weights are cut."""
        self.tp_group = tp_group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is no FP8 state to prepare."""

    def get_extra_state(self) -> torch.Tensor:
        """[0] bytes, or what the loaded checkpoint had."""
        return self._extra_state

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Keep a checkpoint's FP8 state unread.

        Raises:
            ConfigError: the state is not a byte tensor, hence of Transformer Engine 1.
        """
        if state is None:
            return
        if not isinstance(state, torch.Tensor):
            raise ConfigError(f"_extra_state is a {type(state).__name__}; only the byte tensors of Transformer Engine 2 can be kept.")
        self._extra_state = state.detach().clone()

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Give parameters their first values; those on the meta device are given memory first.

        Args:
            defer_init: do nothing, so that meta parameters stay without memory until the next call.
        """
        if defer_init:
            return
        for name, init in self._inits.items():
            self._materialise(name)
            with torch.no_grad(), self._rng_fork():
                init(getattr(self, name))

    def _add_parameter(self, name: str, tensor: torch.Tensor, init: InitMethod) -> torch.nn.Parameter:
        """Register a parameter together with the way to initialise it."""
        parameter = torch.nn.Parameter(tensor)
        self.register_parameter(name, parameter)
        self._inits[name] = init
        return parameter

    def _materialise(self, name: str) -> None:
        old = getattr(self, name)
        if old.device.type != "meta":
            return
        new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="cpu"))
        new.__dict__.update(old.__dict__)
        self.register_parameter(name, new)

    def _rng_fork(self) -> AbstractContextManager[Any]:
        if self._get_rng_state_tracker is None:
            return nullcontext()
        name = getattr(self, "rng_tracker_name", None)
        tracker = self._get_rng_state_tracker()
        return tracker.fork(name) if name else tracker.fork()

    def _set_parallel_state(self, tp_group: ProcessGroup | None, tp_size: int, sequence_parallel: bool) -> None:
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(tp_group)
        else:
            self.tp_size = tp_group.size()
            self.set_tensor_parallel_group(tp_group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def _communication_group(self) -> ProcessGroup | None:
        """The group to communicate in, or None where there is nobody to talk to.

        Raises:
            ConfigError: the weights are cut but no group was set.
        """
        if self.tp_size == 1:
            return None
        if self.tp_group is None:
            raise ConfigError(f"{type(self).__name__}: tp_size is {self.tp_size} but tp_group is None; call set_tensor_parallel_group().")
        return self.tp_group


def no_autocast() -> AbstractContextManager[Any]:
    """Context in which products keep the types of their operands."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
