"""What a checkpoint says about itself, readable in milliseconds: no torch, no weights.

Decisions: `nemo_opt.json` holds everything that is not a tensor (also the learning-rate schedule), since JSON cannot run code and
a person can read it. A newer format version is refused instead of guessed at.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_opt.checkpoint.manifest import check_contents, check_entries, read_manifest
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology

__all__ = ["FORMAT", "FORMAT_VERSION", "INFO_NAME", "TOKENIZER_NAME", "WEIGHTS_NAME", "CheckpointInfo", "read_info", "verify", "write_info"]

INFO_NAME = "nemo_opt.json"
WEIGHTS_NAME = "weights"
TOKENIZER_NAME = "tokenizer"
FORMAT = "nemo_opt.checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Contents of `nemo_opt.json`."""

    path: Path
    """The checkpoint directory."""
    model: ModelConfig
    """Sizes of the model."""
    topology: Topology
    """Layout it was saved from; it can be loaded at any other."""
    world_size: int = 1
    """Ranks that saved it."""
    spec: str = "local"
    """Layer spec it was saved from: `local` or `te`; either loads into either."""
    iteration: int = 0
    """Training steps done."""
    consumed_samples: int = 0
    """Training samples seen, for resuming the data."""
    has_modelopt_state: bool = False
    """Whether it holds ModelOpt's state (a quantised model)."""
    has_optimizer: bool = False
    """Whether it holds the optimizer's state, for resuming."""
    scheduler: dict[str, Any] | None = None
    """State of the learning-rate schedule."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the caller of `save_checkpoint` wanted to keep."""

    @property
    def weights_dir(self) -> Path:
        """Megatron-Core's distributed checkpoint."""
        return self.path / WEIGHTS_NAME

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer that belongs to the model; None if it was saved without one."""
        path = self.path / TOKENIZER_NAME
        return path if path.is_dir() else None


def write_info(info: CheckpointInfo, root: Path) -> None:
    """Writes `info` as `root`/nemo_opt.json."""
    (root / INFO_NAME).write_text(_to_json(info) + "\n", encoding="utf-8")


def _to_json(info: CheckpointInfo) -> str:
    values = {f.name: getattr(info, f.name) for f in fields(info) if f.name != "path"}
    values |= {"model": info.model.to_dict(), "topology": asdict(info.topology)}
    return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **values}, indent=1, allow_nan=False)


def read_info(path: str | Path) -> CheckpointInfo:
    """Reads `path`/nemo_opt.json; checks nothing else.

    Raises:
        CheckpointError: there is no checkpoint, its header is damaged, or a newer nemo_opt wrote it.

    """
    root = Path(path)
    header = root / INFO_NAME
    if not header.is_file():
        raise CheckpointError(_why_not_a_checkpoint(root))
    try:
        values = json.loads(header.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{header} is damaged, not JSON: {error}") from None
    _check_format(header, values)
    return _from_values(root, header, {k: v for k, v in values.items() if k not in ("format", "format_version")})


def _why_not_a_checkpoint(root: Path) -> str:
    if not root.exists():
        return f"there is no checkpoint at {root}: the directory does not exist"
    if not root.is_dir():
        return f"{root} is a file; a checkpoint is a directory with {INFO_NAME}"
    if (root / "config.json").is_file():
        return f"{root} is a Hugging Face directory (it has config.json, no {INFO_NAME}): import it first with `nemo-opt import`"
    if (root / ".metadata").is_file():
        return f"{root} is a bare Megatron-Core checkpoint: it does not say which model it holds ({INFO_NAME} is missing)"
    return f"{root} is not a checkpoint: {INFO_NAME} is missing"


def _check_format(header: Path, values: Any) -> None:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{header} announces format {found!r}, expected {FORMAT!r}")
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{header} has an unknown format version {version!r}; this nemo_opt reads 1..{FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{header} has format version {version}, this nemo_opt reads up to {FORMAT_VERSION}: update nemo_opt")


def _from_values(root: Path, header: Path, values: dict[str, Any]) -> CheckpointInfo:
    if unknown := sorted(values.keys() - {f.name for f in fields(CheckpointInfo)}):
        raise CheckpointError(f"{header} has unknown entries {unknown}")
    try:
        model = ModelConfig.from_dict(_mapping(values.pop("model", None), "model"))
        topology = Topology(**_mapping(values.pop("topology", None), "topology"))
        info = CheckpointInfo(path=root, model=model, topology=topology, **values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{header} is damaged: {error}") from None
    _check_types(header, info)
    return info


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {type(value).__name__}, expected an object")
    return value


def _check_types(header: Path, info: CheckpointInfo) -> None:
    expected: Mapping[str, type | tuple[type, ...]] = {
        "world_size": int,
        "spec": str,
        "iteration": int,
        "consumed_samples": int,
        "has_modelopt_state": bool,
        "has_optimizer": bool,
        "scheduler": (dict, type(None)),
        "versions": dict,
        "extra": dict,
    }
    for name, kind in expected.items():
        if not isinstance(value := getattr(info, name), kind):
            raise CheckpointError(f"{header} is damaged: {name} is {value!r}, a {type(value).__name__}")


def verify(path: str | Path, *, deep: bool = True, progress: bool = True) -> CheckpointInfo:
    """Checks every file of a checkpoint against its manifest and returns its header.

    Args:
        path: The checkpoint directory.
        deep: Also compare checksums, which reads every byte; without it names and sizes are compared.
        progress: Show a bar for large checkpoints when stderr is a terminal.

    Raises:
        CheckpointError: naming the file that is missing, truncated, altered or unlisted.

    """
    info = read_info(path)
    entries = read_manifest(info.path)
    check_entries(info.path, entries)
    if deep:
        check_contents(info.path, entries, progress=progress)
    return info
