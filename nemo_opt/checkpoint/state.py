"""The sharded state of a model and its random states, and whether a checkpoint fits it.

Decisions: every layer and both halves of a gated `linear_fc1` get keys of their own (`singleton_local_shards`), because ModelOpt saves
quantised models so and one form for all lets any checkpoint load anywhere. The optimizer's state is saved parameter by parameter
(`fully_reshardable`), which any layout, data parallel sizes and distributed optimizers included, can read. `_extra_state` entries may be
absent or left over: the two layer specs have different ones. A distilled student comes without its teacher, and with the parameters of its
losses (the projection to the teacher's width) only beside an optimizer, which has their moments. Whether keys and shapes match is decided
over all ranks before anything is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import nemo_opt._stack

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_opt.checkpoint.rng import random_states
from nemo_opt.collective import on_each, rank, world_size
from nemo_opt.errors import CheckpointError
from nemo_opt.models.build import unwrap

__all__ = [
    "LOSS_MODULES_KEY",
    "check_fit",
    "chunk_names",
    "content_metadata",
    "drop_absent",
    "is_extra_state",
    "local_bytes",
    "model_state",
    "rng_state",
]

OPTIMIZER_PREFIX = "optimizer."
RNG_KEY = "rng_state"
COMMON_KEY = "common_state"
LOSS_MODULES_PREFIX = "_loss_modules."

LOSS_MODULES_KEY = "distillation_loss_modules"
"""True in the metadata of `sharded_state_dict` asks a distillation model for the parameters of its losses too."""


def content_metadata() -> dict[str, Any]:
    """Form of the sharded state; a new dict each time, since ModelOpt writes into it."""
    return {
        "singleton_local_shards": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def model_state(chunks: Sequence[Any], *, with_losses: bool = False) -> dict[str, Any]:
    """Sharded state of the chunks: `model` for one, `model0`, `model1`, ... for several. A distilled student comes without its teacher.

    Args:
        chunks: The model's chunks of this rank.
        with_losses: Include the parameters of a distillation's losses, which an optimizer of the chunks has too.

    """
    return {name: _chunk_state(unwrap(chunk), with_losses) for name, chunk in zip(chunk_names(chunks), chunks, strict=True)}


def chunk_names(chunks: Sequence[Any]) -> list[str]:
    """Names of the chunks in a sharded state."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _chunk_state(model: Any, with_losses: bool) -> dict[str, Any]:
    with ExitStack() as hidden:
        if hasattr(model, "hide_teacher_model"):
            hidden.enter_context(model.hide_teacher_model())
            hidden.enter_context(model.hide_loss_modules(enable=not with_losses))
        return dict(model.sharded_state_dict(metadata=content_metadata() | {LOSS_MODULES_KEY: with_losses}))


def rng_state(*, is_loading: bool) -> ShardedObject:
    """Random states of this rank, one entry for each rank of the world."""
    data = None if is_loading else random_states()
    return ShardedObject(RNG_KEY, data, (world_size(),), (rank(),), replica_id=0)


def _entries(state: Any) -> Iterator[ShardedTensor | ShardedObject]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _entries(value.build())
        elif isinstance(value, ShardedTensor | ShardedObject):
            yield value


def _stored_key(entry: ShardedTensor | ShardedObject) -> str:
    return str(entry.unique_key if isinstance(entry, ShardedObject) else entry.key)


def local_bytes(state: Any) -> int:
    """Bytes of the tensors that this rank will write."""
    tensors = [entry for entry in _entries(state) if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id)]
    return sum(entry.data.numel() * entry.data.element_size() for entry in tensors if entry.data is not None)


def is_extra_state(key: str) -> bool:
    """Whether a stored key is a module's `_extra_state`, which is not a weight."""
    return "._extra_state" in key


def drop_absent(state: dict[str, Any], metadata: Metadata, *, absent: Callable[[str], bool] = is_extra_state) -> dict[str, Any]:
    """`state` without those entries for which `absent` allows that the checkpoint lacks them, and which it lacks."""

    def is_kept(value: Any) -> bool:
        if not isinstance(value, ShardedBase):
            return True
        keys = [_stored_key(entry) for entry in _entries([value])]
        return all(key in metadata.state_dict_metadata or not absent(key) for key in keys)

    kept, _ = extract_matching_values(state, is_kept)
    return dict(kept)


def check_fit(state: dict[str, Any], metadata: Metadata, *, strict: bool = True, with_losses: bool = False) -> None:
    """Compares what all ranks want to load with what a checkpoint holds; collective.

    Args:
        state: Sharded state of this rank.
        metadata: Table of contents of the checkpoint.
        strict: Also refuse weights that no rank asks for.
        with_losses: Whether the parameters of a distillation's losses are among them: they go with an optimizer, not with a model.

    Raises:
        CheckpointError: naming missing and unexpected entries, or both shapes of one that differs.

    """
    wanted: dict[str, tuple[int, ...] | None] = {}
    for part in on_each(lambda: {_stored_key(e): _shape(e) for e in _entries(state)}):
        wanted |= part
    stored = {key: _stored_shape(value) for key, value in metadata.state_dict_metadata.items()}
    missing = sorted(wanted.keys() - stored.keys())
    others = [] if with_losses else [LOSS_MODULES_PREFIX]
    unexpected = sorted(key for key in stored.keys() - wanted.keys() if strict and _is_weight(key, *others))
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}")
    for key, shape in wanted.items():
        if shape is not None and stored[key] != shape:
            hint = ": its blocks are cut otherwise at this tp, use the one it was quantised at" if "quantizer" in key else ""
            raise CheckpointError(f"{key} has shape {stored[key]} in the checkpoint and {shape} in the model{hint}")


def _shape(entry: ShardedTensor | ShardedObject) -> tuple[int, ...] | None:
    if isinstance(entry, ShardedObject) or entry.allow_shape_mismatch:
        return None
    return tuple(entry.global_shape)


def _stored_shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.size) if isinstance(value, TensorStorageMetadata) else None


def _is_weight(key: str, *others: str) -> bool:
    """Whether a stored key is a weight; keys that begin with one of `others` are not."""
    return not key.startswith((OPTIMIZER_PREFIX, RNG_KEY, COMMON_KEY, *others)) and not is_extra_state(key)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ("nothing" if not names else ", ".join(names[:limit])) + more
