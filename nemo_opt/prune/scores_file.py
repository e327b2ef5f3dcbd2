"""The file of importance scores: one safetensors file, so that nothing in it can run, with its facts as JSON in the header."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_opt.errors import CheckpointError

__all__ = ["read_scores_file", "write_scores_file"]

_FORMAT = "nemo_opt.importance_scores"
_VERSION = 1
_FACTS = {"model": dict, "tokens": int, "digest": str}


def write_scores_file(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write beside `path`, then rename; raises `CheckpointError` where that is a directory."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; importance scores are one file: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    header = {"format": _FORMAT, "version": _VERSION, **facts}
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata={"nemo_opt": json.dumps(header)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_scores_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the facts; raises `CheckpointError` for anything but a whole file that `write_scores_file` has written."""
    if not path.is_file():
        raise CheckpointError(f"there are no importance scores at {path}: no such file")
    try:
        with safe_open(path, framework="pt") as stream:
            facts = json.loads((stream.metadata() or {}).get("nemo_opt", "{}"))
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118  safe_open is no mapping
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, no safetensors file with importance scores: {error}") from None
    if facts.get("format") != _FORMAT:
        raise CheckpointError(f"{path} holds no importance scores: its format is {facts.get('format')!r}, expected {_FORMAT!r}")
    if facts.get("version") != _VERSION:
        raise CheckpointError(f"{path} has version {facts.get('version')!r}, this nemo_opt reads {_VERSION}: measure again")
    if wrong := [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]:
        raise CheckpointError(f"{path} is damaged: {wrong} are missing or of the wrong type")
    return tensors, facts
