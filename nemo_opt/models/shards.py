"""Which piece of which global weight each rank holds, under names that no layout and no layer spec changes.

Made from Megatron-Core's own `sharded_state_dict`, so it knows what Megatron-Core knows about tensor, pipeline and expert
parallelism. Two of its settings give layout-independent names: `non_homogeneous_layers` spells the global layer index out, and
`singleton_local_shards` gives each expert, and the gate and the up half of a SwiGLU weight, a name of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError

__all__ = ["GATE_SUFFIX", "UP_SUFFIX", "Shard", "full_tensors", "gather_full", "parameter_shards", "quantizer_shards"]

GATE_SUFFIX, UP_SUFFIX = "_w", "_v"
"""What Megatron-Core appends to the key of a SwiGLU weight for its two halves, silu(x W) * (x V)."""

_LAYOUT_INDEPENDENT = {"non_homogeneous_layers": True, "singleton_local_shards": True}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The rectangle of one global weight (or gradient) that this rank holds."""

    key: str
    """Global name, for instance `decoder.layers.3.mlp.linear_fc1.weight_w`."""
    global_shape: tuple[int, ...]
    """Shape of the whole weight."""
    offset: tuple[int, ...]
    """Where this rectangle begins in it."""
    tensor: torch.Tensor
    """A view into the parameter or its gradient: writing here writes there."""

    @property
    def index(self) -> tuple[slice, ...]:
        """Selects this rectangle from the whole weight."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.tensor.shape, strict=True))


def parameter_shards(chunks: Sequence[torch.nn.Module], *, of: Literal["value", "grad"] = "value") -> list[Shard]:
    """The pieces that this rank holds, sorted by key and offset.

    Replicas are listed on every rank that holds one; so is the head of a tied model, on the last pipeline stage, under the key of
    the embedding. Buffers, and what quantization adds, are left out.

    Args:
        chunks: This rank's model chunks, wrapped by DDP or not.
        of: `value` for the parameters; `grad` for `main_grad` where DDP made one, else `grad`. Parameters without a gradient are
            left out.

    """
    shards = []
    for chunk in chunks:
        parameters = {id(parameter): parameter for parameter in _unwrapped(chunk).parameters()}
        for entry in _entries(chunk):
            parameter = parameters.get(id(getattr(entry, "data", None)))
            source = None if parameter is None else parameter.detach() if of == "value" else _gradient(parameter)
            if source is not None:
                shards += [_shard(part) for part in _parts(entry, source)]
    return sorted(shards, key=lambda shard: (shard.key, shard.offset))


def quantizer_shards(chunks: Sequence[torch.nn.Module]) -> list[Shard]:
    """The pieces of what quantization adds that this rank holds (amax, pre_quant_scale), sorted by key and offset.

    Keys are those of the checkpoint, for instance `decoder.layers.3.mlp.linear_fc1.weight_quantizer._amax_w` of a gate's rows. A
    per-channel amax is [rows, 1], one of blocks [rows, blocks] (or [row blocks, blocks]), the others are [1]. Gate and up rows have keys
    of their own once `repair_amax_sharding` was called, as whoever quantises or restores does.
    """
    shards = []
    for chunk in chunks:
        for entry in _entries(chunk):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and "_quantizer." in entry.key:
                shards += [_shard(part) for part in _parts(entry, entry.data.detach())]
    return sorted(shards, key=lambda shard: (shard.key, shard.offset))


def full_tensors(shards: Sequence[Shard]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yields (key, whole weight on the CPU) one by one in key order; the weight on rank 0 only, None elsewhere.

    Collective: every rank must run it to its end. No rank ever holds more than one whole weight.

    Raises:
        ConfigError: The shards of a key disagree about its shape or do not cover it.

    """
    rank = dist.get_rank()
    mine = {(shard.key, shard.offset): shard for shard in shards}
    for key, plan in _plan(shards).items():
        if rank == 0:
            yield key, _assemble(key, plan, mine)
        else:
            for owner, offset, _ in plan.pieces:
                if owner == rank:
                    dist.send(mine[key, offset].tensor.contiguous(), dst=0)
            yield key, None


def gather_full(shards: Sequence[Shard]) -> dict[str, torch.Tensor]:
    """All whole weights by key on rank 0, an empty dict elsewhere. Collective; for models that fit one host."""
    return {key: tensor for key, tensor in full_tensors(shards) if tensor is not None}


@dataclass
class _Plan:
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[int, tuple[int, ...], tuple[int, ...]]]
    """(owner rank, offset, shape); of replicas, the lowest rank's."""


def _plan(shards: Sequence[Shard]) -> dict[str, _Plan]:
    local = [(s.key, s.global_shape, s.offset, tuple(s.tensor.shape), s.tensor.dtype) for s in shards]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    plans: dict[str, _Plan] = {}
    taken = set()
    for owner, entries in enumerate(everyone):
        for key, global_shape, offset, shape, dtype in entries:
            plan = plans.setdefault(key, _Plan(global_shape, dtype, []))
            if plan.global_shape != global_shape:
                raise ConfigError(f"{key} is {plan.global_shape} on one rank and {global_shape} on rank {owner}")
            if (key, offset) not in taken:
                taken.add((key, offset))
                plan.pieces.append((owner, offset, shape))
    for key, plan in plans.items():
        covered = sum(_numel(shape) for _, _, shape in plan.pieces)
        if covered != _numel(plan.global_shape):
            raise ConfigError(f"{key} has {_numel(plan.global_shape)} elements, the ranks hold {covered}")
    return dict(sorted(plans.items()))


def _assemble(key: str, plan: _Plan, mine: dict[tuple[str, tuple[int, ...]], Shard]) -> torch.Tensor:
    whole = torch.empty(plan.global_shape, dtype=plan.dtype)
    for owner, offset, shape in plan.pieces:
        if owner == 0:
            piece = mine[key, offset].tensor
        else:
            piece = torch.empty(shape, dtype=plan.dtype, device=_wire_device(mine))
            dist.recv(piece, src=owner)
        whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))] = piece.cpu()
    return whole


def _wire_device(mine: dict[Any, Shard]) -> torch.device:
    """Where messages must lie: where the model lies, even if this rank holds nothing of these shards."""
    return next(iter(mine.values())).tensor.device if mine else local_device()


def _entries(chunk: Any) -> list[Any]:
    """Of the sharded state. ModelOpt's settings, which it pickles for each module anew, are left out: half of the time of a list."""
    model = _unwrapped(chunk)
    picklers = [found for module in model.modules() if (found := getattr(module, "modelopt_get_extra_state_callbacks", None))]
    kept = [list(callbacks) for callbacks in picklers]
    try:
        for callbacks in picklers:
            callbacks.clear()
        return list(model.sharded_state_dict(metadata=dict(_LAYOUT_INDEPENDENT)).values())
    finally:
        for callbacks, functions in zip(picklers, kept, strict=True):
            callbacks[:] = functions


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    main_grad = getattr(parameter, "main_grad", None)
    return main_grad if main_grad is not None else parameter.grad


def _parts(entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor) -> list[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        entry.data = tensor
        return [entry]
    return list(entry.build_fn(entry.key, tensor, entry.replica_id, None))


def _shard(part: ShardedTensor) -> Shard:
    if part.prepend_axis_num:
        raise ConfigError(f"{part.key} has {part.prepend_axis_num} prepended axes: Megatron-Core no longer spells its index out")
    return Shard(key=part.key, global_shape=tuple(part.global_shape), offset=tuple(part.global_offset), tensor=part.data)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
