"""Random states of a rank, as tensors and plain numbers, so that loading them unpickles nothing.

They belong to one layout: after resharding there is no meaning to "the state of tensor rank 1", so they come back only at the layout
they were saved from.
"""

import random
from typing import Any

import nemo_opt._stack

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemo_opt.device import choose_device

__all__ = ["random_states", "restore_random_states"]


def random_states() -> dict[str, Any]:
    """States of `random`, NumPy, torch, the GPU and Megatron-Core's tracker on this rank."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tracker = get_cuda_rng_tracker().get_states()
    return {
        "random": [version, torch.tensor(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if choose_device().type == "cuda" else None,
        # graph-safe trackers hold generators instead of states
        "tracker": {key: value for key, value in tracker.items() if isinstance(value, torch.Tensor)},
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    version, internal, gauss = states["random"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and choose_device().type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), **states["tracker"]})
