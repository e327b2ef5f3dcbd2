"""A directory of safetensors files, read one slice and written one file at a time, so that no process holds a whole model.

Loads no torch until weights are read or written: to check names, shapes and lengths needs none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from nemo_opt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsReader", "SafetensorsWriter"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsReader:
    """Slices of the weights in a Hugging Face directory, `model.safetensors` or several files with an index.

    Raises `CheckpointError`, naming the file or the weight, wherever the directory is not what it announces. With framework "np" names,
    shapes and types are there without torch; weights are read with "pt" only.
    """

    def __init__(self, directory: str | Path, *, framework: Literal["pt", "np"] = "pt") -> None:
        self._directory = Path(directory)
        self._framework = framework
        self._files: dict[str, Any] = {}
        self._file_of = self._read_names()

    @property
    def names(self) -> set[str]:
        """Of all weights."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a weight, in the format's own words: F32, BF16, F8_E4M3, I8, U8, I32, ..."""
        return str(self._slice(name).get_dtype())

    def whole(self, name: str) -> "torch.Tensor":
        """A weight with all its elements, scalars included."""
        try:
            tensor: torch.Tensor = self._open(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._path(name)}: {name} cannot be read: {error}") from None
        return tensor

    def read(self, name: str, index: tuple[slice, ...]) -> "torch.Tensor":
        """A rectangle of a weight; nothing else is read from the disk."""
        try:
            return self._slice(name)[index]
        except SafetensorError as error:
            raise CheckpointError(f"{self._path(name)}: {name} cannot be read: {error}") from None

    def check(self, expected: Mapping[str, tuple[int, ...]], *, optional: frozenset[str] = frozenset()) -> None:
        """Refuses missing, unexpected, misshapen and non-float weights, naming them, before anything is read.

        Args:
            expected: Shape of every weight that must be there.
            optional: Names that may be there and are ignored.

        """
        if missing := expected.keys() - self.names:
            raise CheckpointError(f"{self._directory} lacks {_listed(missing)}")
        if extra := self.names - expected.keys() - optional:
            raise CheckpointError(f"{self._directory} holds weights that the model does not have: {_listed(extra)}")
        for name, shape in expected.items():
            if (found := self.shape(name)) != shape:
                raise CheckpointError(f"{self._directory}: {name} has shape {found}, the model needs {shape}")
            if (dtype := self._slice(name).get_dtype()) not in _FLOATS:
                raise CheckpointError(f"{self._directory}: {name} is {dtype}, a quantised weight; only {', '.join(_FLOATS)} are read")

    def _read_names(self) -> dict[str, str]:
        index = self._directory / _INDEX
        if not index.exists():
            if not (self._directory / _SINGLE).is_file():
                raise CheckpointError(f"{self._directory} holds neither {_SINGLE} nor {_INDEX} (files of other formats are not read)")
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        weight_map = _weight_map(index)
        for file in sorted(set(weight_map.values())):
            present = set(self._open(file).keys())
            if absent := {name for name, owner in weight_map.items() if owner == file} - present:
                raise CheckpointError(f"{self._directory / file} lacks {_listed(absent)}, which {_INDEX} promises")
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._directory / file, framework=self._framework, device="cpu")
            except FileNotFoundError:
                raise CheckpointError(f"{self._directory / file} is missing, but {_INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._directory / file} is no whole safetensors file (truncated?): {error}") from None
        return self._files[file]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)

    def _path(self, name: str) -> Path:
        return self._directory / self._file_of[name]


class SafetensorsWriter:
    """Collects weights and writes a file whenever `max_file_bytes` are together; `close` writes the rest and the index."""

    def __init__(self, directory: str | Path, *, max_file_bytes: int) -> None:
        self._directory = Path(directory)
        self._max_file_bytes = max_file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: "torch.Tensor") -> None:
        """Takes a weight on the CPU; it is held until its file is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is pending, gives the files their final names, and writes the index if there are several."""
        self._flush()
        total = len(self._written)
        names = [_SINGLE] if total == 1 else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self._directory / name)
        if total > 1:
            weight_map = {weight: name for name, weights in zip(names, self._written, strict=True) for weight in weights}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        well_formed = bool(weight_map) and all(isinstance(n, str) and isinstance(f, str) for n, f in weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from None
    if not well_formed:
        raise CheckpointError(f"{index} is no index of safetensors files: weight_map must map names to files")
    if outside := sorted(f for f in set(weight_map.values()) if Path(f).name != f):
        raise CheckpointError(f"{index} names files outside its directory: {outside}")
    return weight_map


def _listed(names: set[str] | frozenset[str]) -> str:
    shown = sorted(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
