"""Loading never runs what a file says: what upstream unpickles goes through an allow-list that refuses every other global by name.

Pickle is executed in these places when a Megatron-Core checkpoint is loaded:

1. `.metadata`: `pickle.load` in torch's `FileSystemReader.read_metadata`, with no restriction upstream;
2. byte entries of `.distcp` files (common state, `_extra_state`, RNG states): `torch.load(weights_only=False)` in `DefaultLoadPlanner`;
3. a `common.pt` of older Megatron-Core, which `dist_checkpointing.load` prefers to the common state when it is there;
4. all of these again in `modelopt_state/`;
5. inside an `_extra_state`: `torch.load` by ModelOpt, and `pickle.loads` by Transformer Engine;
6. tensors: `torch.load(weights_only=True)`, which an environment variable can turn off.

Decisions: a guard around every load replaces `pickle.load`, `pickle.loads`, `pickle.Unpickler` and `torch.load`, for the loading thread
only; no foreign global is ever looked up, whoever calls. `inspect_weights` walks the places 1-5 under the guard before any long work.
Refusals are remembered, since ModelOpt swallows a RuntimeError on one of these paths. The allow-list of `torch.load` is torch's own plus
what Megatron-Core and ModelOpt have registered with `torch.serialization.add_safe_globals` (configs, enums, quantised tensors).
"""

import io
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_opt.errors import CheckpointError

__all__ = ["ALLOWED_GLOBALS", "guarded", "inspect_weights", "pickle_globals", "read_metadata"]

ALLOWED_GLOBALS: frozenset[str] = frozenset(
    {
        # what .metadata is made of
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        # what Transformer Engine keeps in _extra_state
        "_codecs.encode",
        "_io.BytesIO",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage.UntypedStorage",
        *(
            f"transformer_engine.common.recipe.{name}"
            for name in (
                "DelayedScaling",
                "Float8BlockScaling",
                "Float8CurrentScaling",
                "Format",
                "MMParams",
                "MXFP8BlockScaling",
                "NVFP4BlockScaling",
                "QParams",
                "_FormatHelper",
            )
        ),
    }
)
"""Globals that plain pickles may name; dtypes of torch are allowed beside them."""

_STORAGE_LOADERS = ("torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes")
"""What a tensor in a plain pickle names, the second since Megatron-Core replaces the first; both become a restricted load."""

# taken before any guard replaces it
_torch_load = torch.load


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves allowed globals only; anything else raises before it is imported, let alone called."""

    thread: int | None = None
    """The thread that is restricted; None restricts all."""

    def find_class(self, module: str, name: str) -> Any:
        if self.thread not in (None, threading.get_ident()):
            return super().find_class(module, name)
        if f"{module}.{name}" in _STORAGE_LOADERS:
            return _load_storage
        if f"{module}.{name}" in ALLOWED_GLOBALS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _refusal([f"{module}.{name}"])


def _load_storage(data: bytes) -> Any:
    return _restricted_torch_load(io.BytesIO(data))


def _restricted_torch_load(f: Any, map_location: Any = None, pickle_module: Any = None, **settings: Any) -> Any:
    """`torch.load` with weights_only whatever the caller or the environment asks for."""
    del pickle_module  # excluded by weights_only
    settings["weights_only"] = True
    start = f.tell() if hasattr(f, "tell") else None
    try:
        return _torch_load(f, map_location, **settings)
    except pickle.UnpicklingError as error:
        raise _refusal(_refused_globals(error, f, start), str(error)) from None


_open_guards = threading.local()


def _refusal(names: list[str], reason: str = "") -> CheckpointError:
    named = ", ".join(names) or f"something that is not allowed ({reason.splitlines()[0] if reason else 'unknown'})"
    error = CheckpointError(
        f"refusing to unpickle {named}: loading it could run code. Get the checkpoint from a source you trust, or convert it to safetensors"
    )
    for refused in getattr(_open_guards, "refused", []):
        refused.append(error)
    return error


def _refused_globals(error: pickle.UnpicklingError, f: Any, start: int | None) -> list[str]:
    """The global that torch's message names; where it stopped at an opcode instead, all globals of the file."""
    if named := re.search(r"GLOBAL ([\w.]+) (?:was not|whose module)", str(error)):
        return [named[1]]
    if start is None:
        return pickle_globals(Path(f).read_bytes())
    f.seek(start)
    return pickle_globals(f.read())


def pickle_globals(data: bytes) -> list[str]:
    """Names of the globals that a pickle, or the pickles in a `torch.save` archive, refer to; nothing is executed."""
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    else:
        pickles = [data]
    return sorted({name for content in pickles for name in _globals_of(content)})


def _globals_of(content: bytes) -> Iterator[str]:
    strings: list[str] = []  # those on the unpickler's stack, closely enough for pickles made by dump
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:]) if len(strings) > 1 else "a global with a computed name"
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = strings[-1] if strings else ""
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(str(argument)), ""))
        elif isinstance(argument, str):
            strings.append(argument)


@contextmanager
def guarded() -> Iterator[None]:
    """While it is open, nothing that this thread unpickles can name a global outside of the allow-lists.

    Raises:
        CheckpointError: naming the global; also when a caller in between swallowed the error.

    """
    thread, refused = threading.get_ident(), list[CheckpointError]()
    _open_guards.refused = [*getattr(_open_guards, "refused", []), refused]
    try:
        with ExitStack() as patches:
            for target, name, replacement in _replacements(thread):
                patches.enter_context(patch.object(target, name, replacement))
            yield
    except BaseException as error:  # torch wraps what a reader raises in a BaseException of its own
        if refused and error is not refused[0]:
            raise refused[0] from error
        raise
    finally:
        _open_guards.refused.pop()
    if refused:
        raise refused[0]


def _replacements(thread: int) -> list[tuple[Any, str, Any]]:
    unpickler = type("Unpickler", (_RestrictedUnpickler,), {"thread": thread})

    def load(file: Any, **settings: Any) -> Any:
        return unpickler(file, **settings).load()

    def loads(data: Any, /, **settings: Any) -> Any:
        return unpickler(io.BytesIO(data), **settings).load()

    def torch_load(*args: Any, **settings: Any) -> Any:
        return (_restricted_torch_load if threading.get_ident() == thread else _torch_load)(*args, **settings)

    return [
        (pickle, "load", load),
        (pickle, "loads", loads),
        (pickle, "Unpickler", unpickler),
        (torch, "load", torch_load),
        (torch.serialization, "load", torch_load),
    ]


def read_metadata(weights: Path) -> Metadata:
    """The table of contents of a Megatron-Core checkpoint, unpickled through the allow-list.

    Raises:
        CheckpointError: it is damaged, names a foreign global, or refers to files outside of `weights`.

    """
    path = weights / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _RestrictedUnpickler(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(metadata).__name__}, expected a table of contents")
    for location in metadata.storage_data.values():
        name = PurePosixPath(location.relative_path)
        if len(name.parts) != 1 or name.name == ".." or not (weights / name).is_file():
            raise CheckpointError(f"{path} refers to {location.relative_path!r}, which is no file of {weights}")
    return metadata


def inspect_weights(weights: Path) -> Metadata:
    """Unpickles, through the allow-lists, everything in `weights` (and its `modelopt_state`) that is not a tensor.

    Returns:
        The table of contents of `weights`.

    Raises:
        CheckpointError: naming the file and the global that is refused.

    """
    metadata = read_metadata(weights)
    _inspect_entries(weights, metadata)
    if (modelopt_state := weights / "modelopt_state").is_dir():
        _inspect_entries(modelopt_state, read_metadata(modelopt_state))
    return metadata


def _inspect_entries(weights: Path, metadata: Metadata) -> None:
    if (legacy := weights / "common.pt").exists():
        _inspect(legacy, "", legacy.read_bytes())
        raise CheckpointError(f"{legacy}: this format has no such file, and Megatron-Core would take it for the common state; remove it")
    for index, location in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            path = weights / location.relative_path
            with path.open("rb") as stream:
                _inspect(path, index.fqn, _slice(stream, location.offset, location.length))


def _slice(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def _inspect(path: Path, entry: str, data: bytes) -> None:
    where = f"{path}, entry {entry}" if entry else str(path)
    try:
        with guarded():
            value = torch.load(io.BytesIO(data), map_location="cpu")
            if "_extra_state" in entry:
                _inspect_nested(value)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except Exception as error:  # noqa: BLE001  a damaged archive can raise anything
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}") from None


def _inspect_nested(value: Any) -> None:
    """An `_extra_state` is a pickle or an archive again, in a tensor or a buffer; ModelOpt wraps Transformer Engine's in its own."""
    if isinstance(value, dict):
        for item in value.values():
            _inspect_nested(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _inspect_nested(item)
    elif (data := _bytes_of(value)) is not None:
        if data[:4] == b"PK\x03\x04":
            _inspect_nested(torch.load(io.BytesIO(data), map_location="cpu"))
        elif data[:1] == pickle.PROTO and data[-1:] == pickle.STOP:
            _inspect_nested(pickle.loads(data))  # noqa: S301  restricted by the guard


def _bytes_of(value: Any) -> bytes | None:
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1:
        return value.numpy().tobytes()
    return value if isinstance(value, bytes) else None
