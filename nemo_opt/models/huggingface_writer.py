"""Writing a Hugging Face directory from ranks that each hold a part of the model: whole or not at all, and checked before it appears.

Weights travel to rank 0 one by one and are written in files of limited size, into a hidden directory beside the target, which is renamed at
the end. Errors while weights arrive wait until all have: the other ranks are sending, and learn of them there.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_opt.checkpoint import atomic
from nemo_opt.collective import on_first
from nemo_opt.errors import CheckpointError, NemoOptError
from nemo_opt.models.safetensors_dir import SafetensorsWriter
from nemo_opt.models.shards import Shard, full_tensors

__all__ = ["TOKENIZER_FILES", "Converter", "HuggingFaceWriter", "write_directory"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What an export copies from a tokenizer directory, where it is there."""

Converter = Callable[[str, torch.Tensor], Mapping[str, Mapping[str, torch.Tensor]]]
"""From the key of a `Shard` and the whole weight to, by Hugging Face weight, the tensors that are stored for it."""

_MARKS = ("config.json",)


class HuggingFaceWriter:
    """Rank 0's side of an export: a directory in the making."""

    def __init__(
        self,
        out_dir: Path,
        documents: Mapping[str, Mapping[str, Any]],
        weights: Sequence[str],
        *,
        tokenizer_dir: str | Path | None = None,
        max_file_bytes: int = 2 * 10**9,
        overwrite: bool = False,
    ) -> None:
        """Makes the directory and all of it but the weights.

        Args:
            out_dir: Where it appears in the end.
            documents: JSON files by name; `config.json` among them.
            weights: Hugging Face weights that must be added before `close`.
            tokenizer_dir: Its `TOKENIZER_FILES` are copied.
            max_file_bytes: Of a file of weights, and the most that is held.
            overwrite: Replace an older Hugging Face directory.

        Raises:
            CheckpointError: `out_dir` is not empty, and is not to be replaced.

        """
        self._out_dir, self._overwrite = out_dir, overwrite
        atomic.check_target(out_dir, overwrite=overwrite, marks=_MARKS)
        atomic.remove_stale(out_dir)
        self.directory = atomic.create_beside(out_dir)
        """Of the files, until `publish`."""
        self._missing = dict.fromkeys(weights)
        self._error: Exception | None = None
        try:
            for name, document in documents.items():
                (self.directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
                if (source := Path(tokenizer_dir or "") / name).is_file():
                    shutil.copyfile(source, self.directory / name)
            self._writer = SafetensorsWriter(self.directory, max_file_bytes=max_file_bytes)
        except BaseException:
            self.discard()
            raise

    def add(self, convert: Converter, key: str, weight: torch.Tensor) -> None:
        """Converts and takes one weight; keeps the first error for `close`."""
        if self._error is not None:
            return
        try:
            for name, tensors in convert(key, weight).items():
                if name not in self._missing:
                    raise CheckpointError(f"{key} would be written as {name}, which is written already or in no such model")
                del self._missing[name]
                for stored, tensor in tensors.items():
                    self._writer.add(stored, tensor)
        except (OSError, RuntimeError, ValueError) as error:
            self._error = error

    def close(self) -> None:
        """Writes what is pending. Raises what went wrong, here or in `add`."""
        if self._error is not None:
            raise self._error
        if self._missing:
            raise CheckpointError(f"the ranks hold no {', '.join(self._missing)}: export on every rank, with all chunks")
        self._writer.close()

    def publish(self) -> None:
        """Gives the directory its name."""
        atomic.publish(self.directory, self._out_dir, overwrite=self._overwrite, marks=_MARKS)

    def discard(self) -> None:
        """Removes what was not published; nothing happens if all was."""
        shutil.rmtree(self.directory, ignore_errors=True)


def write_directory(
    shards: Sequence[Shard], begin: Callable[[], HuggingFaceWriter], convert: Converter, *, prove: Callable[[Path], None] | None = None
) -> None:
    """Streams the weights of all ranks into a writer on rank 0. Collective.

    Args:
        shards: The weights of this rank (`parameter_shards`).
        begin: Called on rank 0.
        convert: Called on rank 0 with each whole weight.
        prove: Called on every rank with the directory, complete but without its name yet; raises on every rank to have it removed.

    Raises:
        NemoOptError: On every rank, whatever went wrong on rank 0; nothing is left behind.

    """
    writer: HuggingFaceWriter | None = None

    def start() -> Path:
        nonlocal writer
        writer = begin()
        return writer.directory

    def end(step: Callable[[HuggingFaceWriter], None]) -> Callable[[], None]:
        def run() -> None:
            assert writer is not None
            step(writer)

        return run

    directory = on_first(_named(start))
    try:
        for key, tensor in full_tensors(shards):
            if writer is not None and tensor is not None:
                writer.add(convert, key, tensor)
        on_first(_named(end(HuggingFaceWriter.close)))
        if prove is not None:
            prove(directory)
        on_first(_named(end(HuggingFaceWriter.publish)))
    finally:
        if writer is not None:
            writer.discard()


def _named[T](action: Callable[[], T]) -> Callable[[], T]:
    """`action` with the errors of disk and files as this package's own."""

    def attempt() -> T:
        try:
            return action()
        except NemoOptError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"export failed: {type(error).__name__}: {error}") from error

    return attempt
