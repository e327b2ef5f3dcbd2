"""Writes a sharded state with Megatron-Core, in this process only, with the reason when it fails.

Decisions, each against a habit of Megatron-Core 0.19:
- It reports results through a `multiprocessing.Manager`, whose process re-imports `__main__` and takes a second to start. A synchronous
  save needs none, so a queue of this process takes its place. One writing thread, in the foreground: no forks, no pickled tensors.
- Rank 0 writes the table of contents alone and would leave the others waiting if the disk is full by then: its errors are kept until all
  ranks have finished.
- The operating system's error is logged and lost, so it is remembered here.
- Each tensor gets a CRC-32, which took a quarter of a save and which nobody compares: `torch.load` does not. The manifest has SHA-256 of
  all bytes, taken while they are written.
"""

import logging
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nemo_opt._stack

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from nemo_opt.checkpoint.follower import Follower
from nemo_opt.checkpoint.manifest import FileEntry
from nemo_opt.collective import on_each, on_first
from nemo_opt.errors import CheckpointError, UpstreamMovedError

__all__ = ["check_space", "write_sharded"]

_Writer = filesystem_async.FileSystemWriterAsync
_TARGETS: list[tuple[Any, str]] = [
    (filesystem_async, "_results_queue"),
    (_Writer, "write_preloaded_data"),
    (_Writer, "finish"),
    (serialization, "save_config"),
]


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        CheckpointError: naming both sizes.

    """
    free_bytes = _free_bytes(folder)
    if needed_bytes > free_bytes:
        raise CheckpointError(f"{folder} has {free_bytes / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed: free some space")


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_sharded(state: dict[str, Any], folder: Path) -> dict[str, FileEntry]:
    """Saves `state` as a distributed checkpoint in `folder`, which is made; collective.

    Returns:
        Size and checksum of the files that this rank has written, by name.

    Raises:
        CheckpointError: on every rank, with the reason, if any rank could not write.

    """
    on_first(lambda: folder.mkdir())
    failures: list[Exception] = []
    followers: dict[str, Follower] = {}
    consequence = ""
    try:
        with _in_this_process(failures, followers):
            dist_checkpointing.save(
                state,
                str(folder),
                TorchDistSaveShardedStrategy(thread_count=1),
                # parameter numbers differ between pipeline stages; rank 0's are kept
                preprocess_common_before_consistancy_check=lambda _: {},
            )
    except CheckpointException as error:  # raised on every rank; a BaseException
        consequence = str(error)
    finally:
        entries = {name: entry for name, follower in followers.items() if (entry := follower.entry()) is not None}
    causes = [cause for causes in on_each(lambda: [str(failure) for failure in failures]) for cause in causes]
    reasons = [*causes, consequence] if causes or consequence else []
    if reasons:
        raise CheckpointError(f"could not write {folder}: {reasons[0]} ({_free_bytes(folder) / 1e9:.2f} GB free)")
    return entries


@contextmanager
def _in_this_process(failures: list[Exception], followers: dict[str, Follower]) -> Iterator[None]:
    for owner, name in _TARGETS:
        if not hasattr(owner, name):
            raise UpstreamMovedError(f"{owner.__name__}.{name} is gone; checkpoint/writer.py replaces it while saving")
    with ExitStack() as patches:
        patches.enter_context(patch.object(filesystem_async, "_results_queue", queue.Queue()))
        write = staticmethod(_watched(_Writer.write_preloaded_data, failures, followers))
        patches.enter_context(patch.object(_Writer, "write_preloaded_data", write))
        patches.enter_context(patch.object(_Writer, "finish", _deferred(_Writer.finish, failures)))
        patches.enter_context(patch.object(serialization, "save_config", _deferred(serialization.save_config, failures)))
        patches.enter_context(_without_notices())
        patches.enter_context(_without_crc32())
        yield


def _watched(write: Callable[..., Any], failures: list[Exception], followers: dict[str, Follower]) -> Callable[..., Any]:
    """Follows what `write` writes, and remembers the error that it returns as the second part of its result."""

    def watched(*args: Any, **settings: Any) -> Any:
        if bucket := settings.get("write_bucket"):
            path = Path(bucket[0])
            followers[path.name] = Follower(path)
        result = write(*args, **settings)
        if isinstance(result[1], Exception):
            failures.append(result[1])
        return result

    return watched


def _deferred(function: Callable[..., None], failures: list[Exception]) -> Callable[..., None]:
    """Remembers the error of a function that runs on rank 0 alone, before a collective."""

    def deferred(*args: Any, **settings: Any) -> None:
        try:
            function(*args, **settings)
        except Exception as error:  # noqa: BLE001  raised on every rank by write_sharded
            failures.append(error)

    return deferred


@contextmanager
def _without_crc32() -> Iterator[None]:
    was_computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(was_computed)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Megatron-Core announces on every rank that synchronous saving is deprecated, and each failure twice."""
    loggers = [logging.getLogger(name) for name in ("megatron.core.dist_checkpointing.strategies.torch", filesystem_async.__name__)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
