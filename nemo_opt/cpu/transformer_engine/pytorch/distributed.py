"""Random states per name, activation checkpointing, and questions about FP8 recomputation (whose answers are no)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_opt.cpu.transformer_engine.pytorch._collectives import all_gather_first_dim, reduce_scatter_first_dim
from nemo_opt.cpu.transformer_engine.pytorch.module.base import set_tensor_parallel_attributes
from nemo_opt.errors import ConfigError

__all__ = [
    "CudaRNGStatesTracker",
    "activation_recompute_forward",
    "checkpoint",
    "gather_along_first_dim",
    "get_all_rng_states",
    "graph_safe_rng_available",
    "in_fp8_activation_recompute_phase",
    "is_fp8_activation_recompute_enabled",
    "reduce_scatter_along_first_dim",
    "set_all_rng_states",
    "set_tensor_model_parallel_attributes",
]

set_tensor_model_parallel_attributes = set_tensor_parallel_attributes

_all_states: dict[str, torch.Tensor] = {}


def get_all_rng_states() -> dict[str, torch.Tensor]:
    """The states of every tracker of this process, by name."""
    return dict(_all_states)


def set_all_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Replace the states of every tracker."""
    _all_states.clear()
    _all_states.update(states)


def graph_safe_rng_available() -> bool:
    """Whether generators can be registered with CUDA graphs: there are none."""
    return False


class CudaRNGStatesTracker:
    """Named states of the random generator; `fork` runs a block under one and keeps where it stopped.

    The name is Transformer Engine's: the generator is the CPU's, since that is where random numbers are drawn here.
    """

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all states."""
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """The states, by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace the states."""
        self.states_ = dict(states)
        set_all_rng_states(self.states_)

    def add(self, name: str, seed: int) -> None:
        """Start a state from a seed.

        Raises:
            Exception: the seed or the name is taken.
        """
        if seed in self.seeds_ or name in self.states_:
            raise ConfigError(f"The random state {name!r} with seed {seed}: the name or the seed is already in use.")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()
        _all_states[name] = self.states_[name]

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Run a block under a named state.

        Raises:
            ConfigError: no such state was added.
        """
        if name not in self.states_:
            raise ConfigError(f"The random state {name!r} was not added; there are {sorted(self.states_)}.")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            _all_states[name] = self.states_[name]
            torch.set_rng_state(outside)


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    """Context of a forward pass under checkpointing. It only matters for FP8 scales, and there are none."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    """Whether an FP8 forward pass is running under checkpointing."""
    return False


def in_fp8_activation_recompute_phase() -> bool:
    """Whether an FP8 forward pass is being recomputed."""
    return False


def gather_along_first_dim(
    inp: torch.Tensor, process_group: Any, async_op: bool = False, quantizer: Any = None
) -> tuple[torch.Tensor, None]:
    """Concatenate every rank's tensor along dim 0; always finished on return.

    Raises:
        ConfigError: a quantized gather is asked for.
    """
    if quantizer is not None:
        raise ConfigError("gather_along_first_dim(quantizer=...) needs a GPU; the CPU reference of Transformer Engine gathers unquantized.")
    return (inp if process_group.size() == 1 else all_gather_first_dim(inp, process_group)), None


def reduce_scatter_along_first_dim(inp: torch.Tensor, tp_group: Any, async_op: bool = False) -> tuple[torch.Tensor, None]:
    """Sum over ranks and keep this rank's part of dim 0; always finished on return."""
    return (inp if tp_group.size() == 1 else reduce_scatter_first_dim(inp, tp_group)), None


class _Checkpoint(torch.autograd.Function):
    """Forgets the activations of a function and computes them again, with the same random states, for its gradients."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], tracker: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        ctx.run, ctx.tracker, ctx.kwargs = run, tracker, kwargs
        ctx.rng_state = torch.get_rng_state()
        ctx.tracker_states = None if tracker is None else tracker.get_states()
        ctx.tensor_positions = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        ctx.others = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.save_for_backward(*[arg for arg in args if isinstance(arg, torch.Tensor)])
        with torch.no_grad():
            return run(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args = list(ctx.others)
        for position, tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
            args[position] = tensor.detach().requires_grad_(tensor.requires_grad)
        with _rng_states(ctx.rng_state, ctx.tracker, ctx.tracker_states), torch.enable_grad():
            outputs = ctx.run(*args, **ctx.kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if isinstance(o, torch.Tensor) and o.requires_grad and g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return (None, None, None, *[arg.grad if isinstance(arg, torch.Tensor) else None for arg in args])


@contextmanager
def _rng_states(state: torch.Tensor, tracker: Any, tracker_states: Any) -> Iterator[None]:
    outside = torch.get_rng_state()
    outside_tracker = None if tracker is None else tracker.get_states()
    torch.set_rng_state(state)
    if tracker is not None:
        tracker.set_states(tracker_states)
    try:
        yield
    finally:
        torch.set_rng_state(outside)
        if tracker is not None:
            tracker.set_states(outside_tracker)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: Any = None,
    use_reentrant: bool = True,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """Run a function without keeping its activations; they are recomputed for the gradients.

    Args:
        function: what to run.
        args: its arguments; gradients flow to the tensors among them.
        distribute_saved_activations: refused.
        get_rng_state_tracker: gives the tracker whose states the recomputation must see again.
        tp_group: ranks among which saved activations would be cut; without effect.
        use_reentrant: without effect, the result is the same.
        preserve_rng_state: must be set.
        kwargs: further arguments; no gradients flow to them.

    Returns:
        What the function returns.

    Raises:
        ConfigError: an option is set that is refused.
    """
    if distribute_saved_activations or not preserve_rng_state:
        raise ConfigError(
            "checkpoint(distribute_saved_activations=True) and checkpoint(preserve_rng_state=False) are not available in the CPU reference "
            "of Transformer Engine; leave both at their defaults."
        )
    tracker = None if get_rng_state_tracker is None else get_rng_state_tracker()
    return _Checkpoint.apply(function, tracker, kwargs, *args)
