"""Saving: everything that can be refused is refused first, then written beside the target and renamed into place.

Decisions: collective over all ranks of the job, on a file system they share; every rank hashes what it writes, while it does, and its
share of the other files. A save that fails for any reason removes what it had written and raises on every rank.
"""

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nemo_opt._stack

from nemo_opt import __version__
from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
from nemo_opt.checkpoint.atomic import check_target, create_beside, discard, publish, remove_stale
from nemo_opt.checkpoint.info import TOKENIZER_NAME, WEIGHTS_NAME, CheckpointInfo, write_info
from nemo_opt.checkpoint.manifest import FileEntry, hash_files, list_files, write_manifest
from nemo_opt.checkpoint.modelopt_state import is_converted, needed_state, save_modelopt_state
from nemo_opt.checkpoint.optimizer import optimizer_state
from nemo_opt.checkpoint.sizes import check_same_model
from nemo_opt.checkpoint.state import local_bytes, model_state, rng_state
from nemo_opt.checkpoint.writer import check_space, write_sharded
from nemo_opt.collective import on_each, on_first, rank, world_size
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.build import model_config_of, spec_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology

__all__ = ["save_checkpoint"]


def save_checkpoint(
    path: str | Path,
    chunks: Sequence[Any],
    *,
    topology: Topology,
    model_config: ModelConfig | None = None,
    tokenizer_dir: str | Path | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    iteration: int = 0,
    consumed_samples: int = 0,
    extra: dict[str, Any] | None = None,
    prove: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> CheckpointInfo:
    """Saves a model, and what is needed to go on training it, as one directory. Call it on every rank.

    Args:
        path: The directory to make; it appears whole or not at all.
        chunks: The model's chunks of this rank (DDP and Float16Module may be around them).
        topology: The layout they were built at.
        model_config: Sizes of the model; None reads them from the weights.
        tokenizer_dir: A directory of tokenizer files to keep with the model.
        optimizer: A Megatron-Core optimizer of the chunks, to resume training; random states are saved with it.
        scheduler: Its learning-rate schedule.
        iteration: Training steps done.
        consumed_samples: Training samples seen.
        extra: Anything else, as JSON values.
        prove: Called on every rank with the whole checkpoint before it has its name; what it raises on every rank removes it.
        overwrite: Replace an existing checkpoint; the old one stays whole until the new one is, and is proven.

    Returns:
        What `read_info` will read.

    Raises:
        CheckpointError: The target exists, the disk is full, or the files cannot be written.
        ConfigError: `model_config`, `extra` or `tokenizer_dir` is not what it should be.

    """
    target = Path(path).absolute()
    topology = topology.resolve(world_size())
    modelopt_state = needed_state(chunks)
    info = CheckpointInfo(
        path=target,
        model=_model_config(chunks, model_config),
        topology=topology,
        world_size=world_size(),
        spec=spec_of(chunks[0]),
        iteration=iteration,
        consumed_samples=consumed_samples,
        has_modelopt_state=modelopt_state is not None,
        has_optimizer=optimizer is not None,
        scheduler=_json("the scheduler's state", scheduler.state_dict()) if scheduler is not None else None,
        versions=_versions(),
        extra=_json("extra", extra or {}),
    )
    on_first(lambda: _check_request(target, tokenizer_dir, overwrite=overwrite))
    if is_converted(chunks[0]):
        repair_amax_sharding()
    state = _state(chunks, optimizer)
    needed_bytes = sum(on_each(lambda: local_bytes(state)))
    on_first(lambda: check_space(target, needed_bytes))
    partial = on_first(lambda: _create(target))
    try:
        written = write_sharded(state, partial / WEIGHTS_NAME)
        if modelopt_state is not None:
            save_modelopt_state(modelopt_state, partial / WEIGHTS_NAME)
        on_first(lambda: _write_rest(info, partial, tokenizer_dir))
        _write_manifest(partial, {f"{WEIGHTS_NAME}/{name}": entry for name, entry in written.items()})
        if prove is not None:
            prove(partial)
        on_first(lambda: _publish(partial, target, overwrite=overwrite))
    except BaseException:
        if rank() == 0:
            discard(partial)
        raise
    return info


def _model_config(chunks: Sequence[Any], given: ModelConfig | None) -> ModelConfig:
    found = on_each(lambda: model_config_of(chunks[0]))[0]
    if given is not None:
        check_same_model("model_config", given, "the model", found, error=ConfigError)
    return given or found


def _json(name: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold JSON values only: {error}") from None
    if copy != value:
        raise ConfigError(f"{name} must hold JSON values only, which come back as they were; {value!r} comes back as {copy!r}")
    return dict(copy)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "megatron-core", "nvidia-modelopt")}
    return {"nemo_opt": __version__, "python": platform.python_version(), **packages}


def _check_request(target: Path, tokenizer_dir: str | Path | None, *, overwrite: bool) -> None:
    check_target(target, overwrite=overwrite)
    if tokenizer_dir is not None and (not Path(tokenizer_dir).is_dir() or not any(Path(tokenizer_dir).iterdir())):
        raise ConfigError(f"tokenizer_dir {tokenizer_dir} is not a directory with files in it")


def _state(chunks: Sequence[Any], optimizer: Any) -> dict[str, Any]:
    state = model_state(chunks, with_losses=optimizer is not None)
    if optimizer is None:
        return state
    return {**state, "optimizer": optimizer_state(optimizer, state, is_loading=False), "rng": rng_state(is_loading=False)}


def _create(target: Path) -> Path:
    remove_stale(target)
    try:
        return create_beside(target)
    except OSError as error:
        raise CheckpointError(f"cannot write next to {target}: {error}") from None


def _write_rest(info: CheckpointInfo, partial: Path, tokenizer_dir: str | Path | None) -> None:
    try:
        if tokenizer_dir is not None:
            _copy_files(Path(tokenizer_dir), partial / TOKENIZER_NAME)
        write_info(info, partial)
    except OSError as error:
        raise CheckpointError(f"could not write {partial}: {error}") from None


def _copy_files(source: Path, target: Path) -> None:
    """Copies contents only: links become files, and read-only modes, which would resist overwriting, stay behind."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _write_manifest(partial: Path, known: dict[str, FileEntry]) -> None:
    """Of the checksums that this rank knows, and those of the files whose checksums no rank knows."""
    entries = _merged(on_each(lambda: known))
    names = on_first(lambda: sorted(set(list_files(partial)) - entries.keys(), key=lambda name: -(partial / name).stat().st_size))
    share = names[rank() :: world_size()]
    entries |= _merged(on_each(lambda: hash_files(partial, share, progress=rank() == 0)))
    on_first(lambda: write_manifest(partial, entries))


def _merged(parts: Sequence[dict[str, FileEntry]]) -> dict[str, FileEntry]:
    return {name: entry for part in parts for name, entry in part.items()}


def _publish(partial: Path, target: Path, *, overwrite: bool) -> None:
    try:
        publish(partial, target, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"could not put the checkpoint in place at {target}: {error}") from None
