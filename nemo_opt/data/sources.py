"""Where training data comes from: NeMo's `--data_paths` parsed, and each path checked before anything slow starts.

A path ending in .jsonl or .txt is text; anything else is the prefix of Megatron's PREFIX.bin and PREFIX.idx. The index header is read
here without Megatron, so that a truncated or foreign file is named at once and not met as an assertion in the middle of a run.
No torch in this module.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemo_opt.errors import ConfigError, DataError

__all__ = ["TEXT_SUFFIXES", "DataSource", "IndexHeader", "check_source", "parse_data_paths", "read_index_header"]

TEXT_SUFFIXES = (".jsonl", ".txt")
"""Endings of files that are tokenised here."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # Megatron's dtype codes


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One entry of a blend."""

    path: Path
    """A text file, or the prefix of a .bin/.idx pair."""
    kind: Literal["text", "indexed"]
    """How `path` is read."""
    weight: float | None = None
    """Share of the blend, not normalised; None weighs by the number of tokens."""


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What an .idx file announces."""

    item_bytes: int
    """Bytes of one token."""
    num_sequences: int
    """Sequences; each document written here is one."""
    num_tokens: int
    """Tokens in all sequences."""


def parse_data_paths(paths: Sequence[str]) -> list[DataSource]:
    """The sources that `--data_paths` names: `PATH ...`, or `WEIGHT PATH WEIGHT PATH ...`.

    Raises:
        ConfigError: nothing is named, a weight is not a positive number, or weights and bare paths are mixed.
    """
    if not paths:
        raise ConfigError("data paths are empty; give PATH ..., or WEIGHT PATH WEIGHT PATH ...")
    if not any(_as_number(entry) is not None for entry in paths):
        return [_source(path, None) for path in paths]
    if len(paths) % 2:
        raise ConfigError(f"data paths {list(paths)} mix weights and bare paths; give PATH ..., or WEIGHT PATH WEIGHT PATH ...")
    return [_source(path, _weight(weight, path)) for weight, path in zip(paths[::2], paths[1::2], strict=True)]


def check_source(source: DataSource) -> None:
    """Refuses a source that is missing, empty or truncated.

    Raises:
        DataError: names the file and what it should have been.
    """
    if source.kind == "text":
        _require_file(source.path)
    else:
        read_index_header(source.path)


def read_index_header(prefix: Path) -> IndexHeader:
    """What PREFIX.idx announces, checked against the sizes of both files.

    Raises:
        DataError: a file is missing, is no Megatron index, holds no token, or is shorter than announced.
    """
    idx, bin_ = _pair(prefix)
    with idx.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if header[: len(_MAGIC)] != _MAGIC or len(header) < _HEADER_BYTES:
        raise DataError(f"{idx} is not a Megatron index (it starts with {header[:9]!r}, expected {_MAGIC!r})")
    version, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", header, len(_MAGIC))
    if version != 1 or code not in _ITEM_BYTES:
        raise DataError(f"{idx} has version {version} and dtype code {code}; version 1 and one of {sorted(_ITEM_BYTES)} are understood")
    _require_size(idx, _HEADER_BYTES + num_sequences * 12 + num_documents * 8)
    num_tokens = _sum_lengths(idx, num_sequences)
    if not num_tokens:
        raise DataError(f"{idx} announces no token; build the dataset from a text that is not empty")
    _require_size(bin_, num_tokens * _ITEM_BYTES[code])
    return IndexHeader(item_bytes=_ITEM_BYTES[code], num_sequences=num_sequences, num_tokens=num_tokens)


def _require_size(file: Path, announced: int) -> None:
    if (size := file.stat().st_size) < announced:
        raise DataError(f"{file} is truncated: {size} bytes, {announced} announced by the index")


def _sum_lengths(idx: Path, num_sequences: int) -> int:
    import numpy as np

    if not num_sequences:
        return 0
    lengths = np.memmap(idx, dtype="<i4", mode="r", offset=_HEADER_BYTES, shape=(num_sequences,))
    return int(lengths.sum(dtype=np.int64))


def _as_number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def _weight(entry: str, path: str) -> float:
    weight = _as_number(entry)
    if weight is None or not math.isfinite(weight) or weight <= 0:
        raise ConfigError(f"weight {entry!r} of data path {path!r} is not a positive number")
    return weight


def _source(entry: str, weight: float | None) -> DataSource:
    if not entry.strip() or _as_number(entry) is not None:
        raise ConfigError(f"{entry!r} stands where a data path is expected; give PATH ..., or WEIGHT PATH WEIGHT PATH ...")
    path = Path(entry.strip()).expanduser()
    return DataSource(path=path, kind="text" if path.suffix in TEXT_SUFFIXES else "indexed", weight=weight)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")


def _pair(prefix: Path) -> tuple[Path, Path]:
    if prefix.suffix in (".idx", ".bin"):
        raise DataError(f"{prefix} names one file of a pair; give the prefix {prefix.with_suffix('')}")
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if missing := [file.name for file in (idx, bin_) if not file.is_file()]:
        hint = f"; {prefix} is a file, but only {', '.join(TEXT_SUFFIXES)} are read as text" if prefix.is_file() else ""
        raise DataError(f"data prefix {prefix} needs {idx.name} and {bin_.name}; missing: {', '.join(missing)}{hint}")
    return idx, bin_
