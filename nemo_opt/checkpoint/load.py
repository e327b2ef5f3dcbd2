"""Loading: the whole checkpoint is verified first, then restored at whatever layout and layer spec the model has.

Order, so that bad input is refused before long work: header, files and checksums (shared among the ranks), everything that is unpickled
(through the allow-list), model sizes, ModelOpt's state, keys and shapes over all ranks, and only then the weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.metadata import Metadata

from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
from nemo_opt.checkpoint.info import CheckpointInfo, verify
from nemo_opt.checkpoint.manifest import check_contents, read_manifest
from nemo_opt.checkpoint.modelopt_state import is_converted, restore_modelopt_state
from nemo_opt.checkpoint.optimizer import load_optimizer, optimizer_state
from nemo_opt.checkpoint.rng import restore_random_states
from nemo_opt.checkpoint.safe_unpickle import guarded, inspect_weights
from nemo_opt.checkpoint.sizes import check_same_model
from nemo_opt.checkpoint.state import (
    check_fit,
    chunk_names,
    drop_absent,
    is_extra_state,
    model_state,
    rng_state,
)
from nemo_opt.collective import on_each, on_first, rank, world_size
from nemo_opt.errors import CheckpointError
from nemo_opt.models.build import Spec, build_model, model_config_of, unwrap
from nemo_opt.parallel import Topology, current_topology

__all__ = ["load_checkpoint", "restore_model"]


def load_checkpoint(
    path: str | Path,
    chunks: Sequence[Any],
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    strict: bool = True,
    deep: bool = True,
) -> CheckpointInfo:
    """Loads a checkpoint into a model that is already built, at any layout and layer spec. Call it on every rank.

    A checkpoint of a quantised model first quantises the (unquantised) chunks in place. Random states come back with the optimizer, if the
    layout is the one that was saved.

    Args:
        path: The checkpoint directory.
        chunks: The model's chunks of this rank.
        optimizer: A Megatron-Core optimizer of the chunks, to restore its state. Without it, an optimizer with its own copy of the weights
            needs `reload_model_params()` afterwards.
        scheduler: Its learning-rate schedule.
        strict: Refuse checkpoints that hold weights which the model does not have; missing weights are refused in any case.
        deep: Compare checksums, which reads every byte once more; without it names and sizes are compared.

    Returns:
        The header: iteration, consumed samples, tokenizer directory and so on.

    Raises:
        CheckpointError: The checkpoint is damaged, unsafe, or does not fit the model.

    """
    info, metadata = _open(path, deep=deep)
    on_each(lambda: check_same_model("the checkpoint", info.model, "the model", model_config_of(chunks[0]), error=CheckpointError))
    _check_resumable(info, optimizer, scheduler)
    _load(info, metadata, chunks, optimizer, strict=strict)
    if scheduler is not None:
        _load_scheduler(info, scheduler)
    return info


def restore_model(
    path: str | Path,
    topology: Topology,
    *,
    spec: Spec | None = None,
    dtype: torch.dtype | None = None,
    deep: bool = True,
    vocab_size: int | None = None,
    **transformer_overrides: Any,
) -> tuple[list[Any], CheckpointInfo]:
    """Builds the model that a checkpoint describes, at any layout, with its ModelOpt state and weights. Call it on every rank.

    Args:
        path: The checkpoint directory.
        topology: The layout to build; model parallel state must have been initialised for it.
        spec: Layer spec; None takes the device's default, whatever the checkpoint was saved from.
        dtype: Of the weights; None takes the device's.
        deep: As in `load_checkpoint`.
        vocab_size: Of the model, in place of the checkpoint's: rows that the checkpoint lacks become zero, those beyond are not loaded.
        transformer_overrides: Fields of Megatron-Core's TransformerConfig.

    Returns:
        The model's chunks of this rank, and the header.

    Raises:
        CheckpointError: The checkpoint is damaged or unsafe.
        ConfigError: The model does not fit the topology.

    """
    info, metadata = _open(path, deep=deep)
    topology.validate(world_size(), info.model)
    # The rows that pad the vocabulary may differ: Megatron-Core marks embedding and head with allow_shape_mismatch.
    config = info.model if vocab_size is None else info.model.with_(vocab_size=vocab_size)
    chunks = build_model(config, topology, spec=spec, dtype=dtype, seed=None, **transformer_overrides)
    _load(info, metadata, chunks, None, strict=True)
    return chunks, info


def _open(path: str | Path, *, deep: bool) -> tuple[CheckpointInfo, Metadata]:
    """Header and table of contents of a checkpoint that is whole and safe."""
    root = Path(path).absolute()
    info = on_first(lambda: verify(root, deep=False))
    if deep:
        on_each(lambda: _verify_share(root))
    return info, on_first(lambda: inspect_weights(info.weights_dir))


def _verify_share(root: Path) -> None:
    """Compares the checksums of this rank's share of the files, which are dealt out by size."""
    entries = sorted(read_manifest(root).items(), key=lambda item: -item[1].bytes)
    check_contents(root, dict(entries[rank() :: world_size()]), progress=rank() == 0)


def _check_resumable(info: CheckpointInfo, optimizer: Any, scheduler: Any) -> None:
    if optimizer is not None and not info.has_optimizer:
        raise CheckpointError(f"{info.path} holds no optimizer state: load it without an optimizer, or resume from another")
    if scheduler is not None and info.scheduler is None:
        raise CheckpointError(f"{info.path} holds no learning-rate schedule: load it without a scheduler")


def _load(info: CheckpointInfo, metadata: Metadata, chunks: Sequence[Any], optimizer: Any, *, strict: bool) -> None:
    with guarded():
        _restore_modelopt(info, metadata, chunks, optimizer)
        state = _wanted(info, metadata, chunks, optimizer)
        check_fit(state, metadata, strict=strict, with_losses=optimizer is not None)
        try:
            loaded = dist_checkpointing.load(state, str(info.weights_dir))
        except CheckpointingException as error:
            raise CheckpointError(f"{info.weights_dir} does not fit the model: {error}") from error
        _set_weights(chunks, loaded)
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
    if "rng" in loaded:
        restore_random_states(loaded["rng"])


def _restore_modelopt(info: CheckpointInfo, metadata: Metadata, chunks: Sequence[Any], optimizer: Any) -> None:
    if not info.has_modelopt_state:
        return
    if is_converted(chunks[0]):
        repair_amax_sharding()
        return
    if optimizer is not None:
        raise CheckpointError(f"{info.path} holds a quantised model: build it with restore_model first, and its optimizer afterwards")
    restore_modelopt_state(chunks, info.weights_dir, metadata)


def _wanted(info: CheckpointInfo, metadata: Metadata, chunks: Sequence[Any], optimizer: Any) -> dict[str, Any]:
    state = drop_absent(model_state(chunks, with_losses=optimizer is not None), metadata)
    if optimizer is None:
        return state
    state["optimizer"] = optimizer_state(optimizer, state, is_loading=True)
    if current_topology() == info.topology and world_size() == info.world_size:
        state["rng"] = rng_state(is_loading=True)
    return state


def _set_weights(chunks: Sequence[Any], loaded: dict[str, Any]) -> None:
    for chunk, name in zip(chunks, chunk_names(chunks), strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        wrong = [key for key in [*missing, *unexpected] if not is_extra_state(f".{key}")]
        if wrong:
            raise CheckpointError(f"the model and its sharded state disagree about {sorted(wrong)}")


def _load_scheduler(info: CheckpointInfo, scheduler: Any) -> None:
    scheduler.num_steps = 0  # its load_state_dict steps from wherever it is
    try:
        scheduler.load_state_dict(dict(info.scheduler or {}))
    except AssertionError as error:
        raise CheckpointError(f"the learning-rate schedule differs from the one in {info.path}: {error}") from None
