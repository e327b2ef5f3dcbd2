"""Topology: how ranks are shared between tensor, pipeline, context, expert and data parallelism; its start and its end.

`axis` means an axis of the rank mesh. Validation needs no torch, so a wrong flag is refused before the stack is loaded.
The world (torch's default process group) is made once a process and stays until exit: under torchrun a second rendezvous would meet the
keys of the first in the agent's store. `initialize` and `destroy` make and release Megatron-Core's groups within it, any number of times.
Megatron-Core's extra gloo groups are not made: on gloo they duplicate the others, and one of them ignores the timeout.
"""

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemo_opt.errors import ConfigError

if TYPE_CHECKING:
    from nemo_opt.models.config import ModelConfig

__all__ = ["Topology", "current_topology", "destroy", "initialize", "parallel", "start_world"]

_AXES = {"TP": "tp", "PP": "pp", "VP": "vp", "CP": "cp", "EP": "ep", "DP": "dp", "FIRST": "first_stage_layers", "LAST": "last_stage_layers"}
_TOKEN = re.compile(r"(TP|PP|VP|CP|EP|DP|FIRST|LAST)(\d+)|(SP)")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the parallel axes. `dp` is what remains of the world when None."""

    tp: int = 1
    """Tensor parallel ranks: each weight matrix is split."""
    pp: int = 1
    """Pipeline parallel stages: layers are split."""
    vp: int = 1
    """Model chunks of one pipeline stage (interleaved schedule); 1 means not interleaved."""
    cp: int = 1
    """Context parallel ranks: the sequence is split through the whole model."""
    ep: int = 1
    """Expert parallel ranks; they lie inside the data and context parallel axes, as in Megatron-Core."""
    dp: int | None = None
    """Data parallel replicas; None means world_size // (tp * pp * cp)."""
    sp: bool = False
    """Sequence parallel: activations between tensor-parallel regions are split along the sequence."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage; None splits evenly."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage; None splits evenly."""

    def __post_init__(self) -> None:
        for field in _AXES.values():
            value, optional = getattr(self, field), field in ("dp", "first_stage_layers", "last_stage_layers")
            if not (optional and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{field} must be a positive integer, got {value!r}")
        if self.sp and self.tp == 1:
            raise ConfigError("sp (sequence parallel) splits what tp ranks share, but tp is 1: set tp > 1 or sp off")
        if self.vp > 1 and self.pp == 1:
            raise ConfigError(f"vp {self.vp} interleaves pipeline stages, but pp is 1: set pp > 1 or vp 1")
        if self.pp == 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ConfigError("first_stage_layers and last_stage_layers need pp > 1, but pp is 1")
        if self.ep > 1 and self.tp > 1 and not self.sp:
            raise ConfigError(f"ep {self.ep} with tp {self.tp} needs sp (Megatron-Core refuses it without): set sp")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        """Ranks of the whole layout, taking an open dp as the smallest that ep allows."""
        return self.model_parallel_size * (self.dp or self._smallest_dp)

    @property
    def _smallest_dp(self) -> int:
        return next(dp for dp in range(1, self.ep + 1) if (dp * self.cp) % self.ep == 0)

    @property
    def name(self) -> str:
        """Short name such as TP2PP1, TP2PP1SP or TP1PP2VP2; axes of size 1 other than TP and PP are left out."""
        always = ("tp", "pp")
        sizes = [f"{token}{value}" for token, field in _AXES.items() if (value := getattr(self, field)) and (value > 1 or field in always)]
        stages = [f"{token}1" for token, field in _AXES.items() if token in ("FIRST", "LAST") and getattr(self, field) == 1]
        return "".join([*sizes, *stages, "SP" if self.sp else ""])

    @classmethod
    def from_name(cls, name: str) -> "Topology":
        """The inverse of `name`; axes may be left out (`CP2`) and stand in any order. Raises `ConfigError` on anything else."""
        values: dict[str, int | bool] = {}
        end = 0
        for match in _TOKEN.finditer(name.upper()):
            field = "sp" if match[3] else _AXES[match[1]]
            if match.start() != end or field in values:
                break
            values[field] = True if match[3] else int(match[2])
            end = match.end()
        if not name or end != len(name):
            raise ConfigError(f"{name!r} names no layout (stopped at {name[end:]!r}): write for example TP2PP1, TP2PP2SP or TP1PP2VP2")
        return cls(**values)  # type: ignore[arg-type]

    def resolve(self, world_size: int) -> "Topology":
        """The same layout with dp filled in; raises `ConfigError` where the axes do not fill `world_size`."""
        product = " * ".join(f"{axis} {getattr(self, axis)}" for axis in ("tp", "pp", "cp") if axis != "cp" or self.cp > 1)
        if world_size < 1:
            raise ConfigError(f"world_size must be positive, got {world_size}")
        if self.dp is None and world_size % self.model_parallel_size:
            needed = -(-world_size // self.model_parallel_size) * self.model_parallel_size
            raise ConfigError(f"world_size {world_size} is no multiple of {product}: start {needed} ranks or change the axes")
        resolved = replace(self, dp=self.dp or world_size // self.model_parallel_size)
        if world_size != resolved.world_size:
            raise ConfigError(f"world_size {world_size} != {product} * dp {resolved.dp}: start {resolved.world_size} ranks or set dp")
        assert resolved.dp is not None
        if (resolved.dp * self.cp) % self.ep:
            raise ConfigError(f"dp {resolved.dp} * cp {self.cp} is no multiple of ep {self.ep}: experts are shared inside those axes")
        return resolved

    def validate(self, world_size: int, model: "ModelConfig | None" = None) -> "Topology":
        """`resolve`, and whether the model can be split so; returns the resolved layout, raises `ConfigError`."""
        resolved = self.resolve(world_size)
        if model is not None:
            self._validate_widths(model)
            self._validate_layers(model.num_layers)
            self._validate_experts(model.num_moe_experts)
        return resolved

    def validate_sequence(self, seq_length: int) -> None:
        """Raises `ConfigError` where a sequence of `seq_length` tokens cannot be shared by the cp and sp ranks."""
        if self.cp > 1 and seq_length % (2 * self.cp):
            raise ConfigError(f"seq_length {seq_length} % (2 * cp {self.cp}) != 0: each cp rank takes one early and one late slice")
        if self.sp and (seq_length // self.cp) % self.tp:
            raise ConfigError(f"seq_length {seq_length} / cp {self.cp} % tp {self.tp} != 0: sp splits the sequence over tp ranks")

    def _validate_widths(self, model: "ModelConfig") -> None:
        for field in ("num_attention_heads", "ffn_hidden_size", "padded_vocab_size"):
            if getattr(model, field) % self.tp:
                raise ConfigError(f"{field} {getattr(model, field)} % tp {self.tp} != 0: choose a tp that divides it")
        groups = model.num_query_groups
        if groups % self.tp and self.tp % groups:
            raise ConfigError(f"num_query_groups {groups} and tp {self.tp}: one must divide the other")

    def _validate_layers(self, num_layers: int) -> None:
        fixed = [n for n in (self.first_stage_layers, self.last_stage_layers) if n is not None]
        stages, layers = self.pp - len(fixed), num_layers - sum(fixed)
        split = f"num_layers {num_layers}" + "".join(f" - {n}" for n in fixed)
        if layers < 0 or bool(stages) != bool(layers):
            raise ConfigError(f"{split} leaves {layers} layers for {stages} pipeline stages of pp {self.pp}: change the stage layers")
        if stages and layers % (stages * self.vp):
            remedy = (
                "choose sizes that divide the layers" if fixed else "choose pp * vp that divides the layers or set first/last_stage_layers"
            )
            raise ConfigError(f"{split} % ({'remaining stages' if fixed else 'pp'} {stages} * vp {self.vp}) != 0: {remedy}")
        if uneven := [n for n in fixed if n % self.vp]:
            raise ConfigError(f"stage layers {uneven} % vp {self.vp} != 0: each stage is cut into vp chunks")

    def _validate_experts(self, num_experts: int | None) -> None:
        if self.ep > 1 and num_experts is None:
            raise ConfigError(f"ep {self.ep} splits experts, but the model is dense: set ep 1 or num_moe_experts")
        if num_experts is not None and num_experts % self.ep:
            raise ConfigError(f"num_moe_experts {num_experts} % ep {self.ep} != 0: choose an ep that divides the experts")


_current: Topology | None = None


def current_topology() -> Topology | None:
    """The resolved layout that `initialize` set up in this process, or None."""
    return _current


def start_world(*, timeout_s: float = 120.0) -> int:
    """Make torch's default process group from torchrun's environment, or one of this process alone; returns the world size.

    Does nothing where the group exists already. Raises `ConfigError` on an incomplete environment.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from nemo_opt.device import choose_device

    if dist.is_initialized():
        return dist.get_world_size()
    choice, timeout = choose_device(), timedelta(seconds=timeout_s)
    present = [name for name in _ENVIRONMENT if name in os.environ]
    if choice.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if {"RANK", "WORLD_SIZE"}.isdisjoint(present):
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(choice.backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif missing := [name for name in _ENVIRONMENT if name not in present]:
        raise ConfigError(f"the environment has {present} but not {missing}: start the ranks with torchrun, or unset the former")
    else:
        dist.init_process_group(choice.backend, init_method="env://", timeout=timeout)
    atexit.register(_end_world)
    return dist.get_world_size()


def initialize(topology: Topology, *, seed: int = 1234, timeout_s: float = 120.0, model: "ModelConfig | None" = None) -> Topology:
    """Set up Megatron-Core's groups and seeds for `topology`; collective.

    Args:
        topology: The layout; dp is filled in from the world.
        seed: Of torch, numpy and random on every rank; Megatron-Core derives its tensor and expert parallel states from it.
        timeout_s: After this long without an answer a collective fails.
        model: Checked against the layout before any group is made.

    Returns:
        The resolved layout.

    Raises:
        ConfigError: The layout does not fit the world or the model, or another one is still set up.

    """
    global _current
    if _current is not None:
        raise ConfigError(f"layout {_current.name} is still set up: call nemo_opt.parallel.destroy() before {topology.name}")
    if "WORLD_SIZE" in os.environ:
        topology.validate(int(os.environ["WORLD_SIZE"]), model)

    import nemo_opt._stack

    from megatron.core import parallel_state

    resolved = topology.validate(start_world(timeout_s=timeout_s), model)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=resolved.tp,
        pipeline_model_parallel_size=resolved.pp,
        virtual_pipeline_model_parallel_size=resolved.vp if resolved.vp > 1 else None,
        context_parallel_size=resolved.cp,
        expert_model_parallel_size=resolved.ep,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    _current = resolved
    _seed_everything(seed)
    return resolved


def destroy(*, wait: bool = True) -> None:
    """Release Megatron-Core's groups, after a barrier unless `wait` is False (after an error, when peers may be gone). Idempotent."""
    global _current
    if _current is None:
        return
    _current = None

    import gc

    import nemo_opt._stack

    import torch.distributed as dist
    from megatron.core import parallel_state

    if wait:
        dist.barrier()
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    _reset_globals()
    for group in groups:
        dist.destroy_process_group(group)
    # Models hold the groups in cycles, and a gloo group keeps its threads for as long as it is referenced.
    del groups
    gc.collect()


@contextmanager
def parallel(topology: Topology, *, seed: int = 1234, timeout_s: float = 120.0, model: "ModelConfig | None" = None) -> Iterator[Topology]:
    """`initialize` on entry, `destroy` on exit; yields the resolved layout."""
    resolved = initialize(topology, seed=seed, timeout_s=timeout_s, model=model)
    try:
        yield resolved
    except BaseException:
        destroy(wait=False)
        raise
    destroy()


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)  # Megatron-Core's datasets use the global state
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _reset_globals() -> None:
    """Forget what Megatron-Core keeps beside parallel_state and would carry over into the next layout."""
    from megatron.core import num_microbatches_calculator, rerun_state_machine

    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()


def _end_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
