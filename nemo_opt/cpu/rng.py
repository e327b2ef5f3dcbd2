"""Random states of the pretended devices.

Every random operation here draws from PyTorch's one CPU generator, whatever device was meant, since tensors cannot tell. So the current
device's state *is* the CPU generator's: Megatron's tracker, which saves, exchanges and restores the device's state, really forks streams.
Another device's state is parked and comes back when that device is made current. A device that was never current continues the
running stream.
"""

from typing import Any

import torch

from nemo_opt.cpu import devices
from nemo_opt.cpu.patches import set_attribute, set_functions

__all__ = ["install", "set_device"]

_parked: dict[int, torch.Tensor] = {}


def set_device(device: Any) -> None:
    """Makes a device current: parks the random state of the last one and takes up this one's."""
    index, last = devices.index_of(device), devices.current_device()
    if index == last:
        return
    devices.set_current_device(index)
    _parked[last] = torch.default_generator.get_state()
    if index in _parked:
        torch.default_generator.set_state(_parked.pop(index))


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    index = devices.index_of(device)
    if index != devices.current_device() and index in _parked:
        return _parked[index].clone()
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    index = devices.index_of(device)
    if index == devices.current_device():
        torch.default_generator.set_state(new_state)
    else:
        _parked[index] = new_state.clone()


def _get_rng_state_all() -> list[torch.Tensor]:
    return [_get_rng_state(index) for index in range(max(1, devices.device_count()))]


def _set_rng_state_all(new_states: Any) -> None:
    for index, state in enumerate(new_states):
        _set_rng_state(state, index)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _manual_seed_all(seed: int) -> None:
    """`torch.manual_seed` calls this too, and must not be called back."""
    _parked.clear()
    torch.default_generator.manual_seed(int(seed))


def _seed() -> None:
    torch.default_generator.seed()


def _seed_all() -> None:
    _parked.clear()
    torch.default_generator.seed()


def _initial_seed() -> int:
    return torch.default_generator.initial_seed()


def install() -> None:
    """Replaces the functions of `torch.cuda.random`, in both namespaces, and `torch.cuda.default_generators`."""
    functions = {
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "get_rng_state_all": _get_rng_state_all,
        "set_rng_state_all": _set_rng_state_all,
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed_all,
        "seed": _seed,
        "seed_all": _seed_all,
        "initial_seed": _initial_seed,
    }
    set_functions(torch.cuda.random, functions)
    for name in functions:
        set_attribute(torch.cuda, name, getattr(torch.cuda.random, name))
    set_attribute(torch.cuda, "default_generators", (torch.default_generator,) * max(1, devices.device_count()))
