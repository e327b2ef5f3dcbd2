"""Megatron-Core optimizers in checkpoints, plain and distributed, with what Megatron-Core 0.19 leaves out for torch's Adam.

Adam of Transformer Engine or Apex counts steps once a group; torch's (the CPU backend's, and a GPU's without those packages) counts
them for each parameter, and Megatron-Core's checkpoints were made for the former. Repaired here, each seen to fail:

1. moments made for an optimizer that has not stepped come without a count: the next step is a KeyError;
2. a count of 0 is not saved, since 0 is falsy: loading it is a KeyError;
3. a distributed optimizer loads no count, but looks for one in what it loads: a KeyError;
4. a distributed optimizer gives all parameters one tensor as their count, which then grows by the number of parameters each step.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import nemo_opt._stack

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_opt.checkpoint.state import content_metadata

__all__ = ["load_optimizer", "optimizer_state"]


def optimizer_state(optimizer: Any, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded state of a Megatron-Core optimizer whose parameters are those of `model` (from `model_state`)."""
    _complete(optimizer)
    state = dict(optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=content_metadata()))
    if not is_loading:
        _keep_count_of_zero(state)
    return state


def load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Gives the optimizer what was loaded into its `optimizer_state`."""
    with ExitStack() as patches:
        for part in _parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                original = part._set_main_param_and_optimizer_states
                patches.enter_context(patch.object(part, "_set_main_param_and_optimizer_states", _without_count(original)))
        optimizer.load_state_dict(loaded)
    _complete(optimizer)


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers in a chain that hold parameters."""
    for part in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        if getattr(part, "optimizer", None) is not None:
            yield part


def _complete(optimizer: Any) -> None:
    """Gives each parameter moments and a step count of its own (faults 1 and 4)."""
    for part in _parts(optimizer):
        if getattr(part, "init_state_fn", None) is not None:
            part.init_state_fn(part.optimizer, part.config)  # leaves what is there alone
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)


def _keep_count_of_zero(state: dict[Any, Any]) -> None:
    """Adds the count that Megatron-Core leaves out when it is 0 (fault 2), wherever an optimizer's state lies in `state`."""
    if "param_groups" in state and isinstance(state.get("state"), dict):
        state["state"].setdefault("common_step", torch.tensor(0.0))
    for value in state.values():
        if isinstance(value, dict):
            _keep_count_of_zero(value)


def _without_count(original: Callable[..., None]) -> Callable[..., None]:
    """Tells Megatron-Core that there is no tensor to copy a count from (fault 3)."""

    def set_states(model_param: Any, tensors: dict[str, Any]) -> None:
        original(model_param, {"step": None, **tensors})

    return set_states
