"""Hugging Face Llamas in and out of a GPTModel at any layout, without a process that holds the whole model.

Import: each rank reads the rows and columns of its own shards from the safetensors files. Export: weights travel to rank 0 one by one, and
are written in files of limited size. An export is written beside its place and renamed, so a directory with that name is complete.
Unquantised models only: what quantization adds has exporters of its own.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import nemo_opt._stack

import torch

from nemo_opt.checkpoint import atomic
from nemo_opt.collective import on_first
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface_config import config_from_hf, config_to_hf, special_token_ids
from nemo_opt.models.huggingface_names import hf_pieces, hf_shapes
from nemo_opt.models.safetensors_dir import SafetensorsReader, SafetensorsWriter
from nemo_opt.models.shards import Shard, full_tensors, parameter_shards
from nemo_opt.models.sizes import model_config_of, unwrap

__all__ = ["TOKENIZER_FILES", "config_from_hf", "export_hf", "import_hf"]

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

_NO_MATTER_FOR_WEIGHTS = ("init_method_std", "max_position_embeddings")


def import_hf(directory: str | Path, chunks: Sequence[torch.nn.Module]) -> ModelConfig:
    """Fills the weights of this rank's chunks from a Hugging Face directory; rows that pad the vocabulary become zero.

    Args:
        directory: Holds `config.json` and safetensors files.
        chunks: A built model of the same sizes, at any layout, of either spec.

    Returns:
        The sizes that the directory announces.

    Raises:
        ConfigError: The directory holds no supported Llama, or one of other sizes than the model; names both.
        CheckpointError: Weights are missing, truncated, unexpected or of another shape; names them. The model is untouched.

    """
    config = config_from_hf(directory)
    _check_same(directory, config, model_config_of(chunks))
    reader = SafetensorsReader(directory)
    reader.check(hf_shapes(config), optional=_ignored(config, reader.names))
    with torch.no_grad():
        for shard in parameter_shards(chunks):
            _read(reader, shard, config)
    return config


def export_hf(
    chunks: Sequence[torch.nn.Module],
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 2 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Writes the model as a directory that transformers loads. Collective: call it on every rank.

    Args:
        chunks: This rank's chunks, at any layout, of either spec.
        out_dir: Must not exist, or be empty.
        tokenizer_dir: Its `TOKENIZER_FILES` are copied, and its special tokens named in `config.json`.
        dtype: Of the written weights; None keeps the model's.
        max_file_bytes: Also the most that rank 0 holds, beside one weight.
        overwrite: Replace an older Hugging Face directory, once the new one is whole.

    Raises:
        ConfigError: LlamaForCausalLM cannot express the model, or it is quantised.
        CheckpointError: `out_dir` is not empty, or cannot be written. Raised on every rank.

    """
    out_dir = Path(out_dir)
    config = model_config_of(chunks)
    _refuse_quantized(chunks)
    shards = parameter_shards(chunks)
    dtype = dtype or unwrap(chunks[0]).config.params_dtype
    export: _Export | None = None

    def begin() -> None:
        nonlocal export
        export = _Export(config, out_dir, dtype, tokenizer_dir, max_file_bytes, overwrite)

    def end() -> None:
        assert export is not None
        export.finish()

    on_first(_named(begin))
    for key, tensor in full_tensors(shards):
        if export is not None and tensor is not None:
            export.add(key, tensor)
    on_first(_named(end))
    return out_dir


class _Export:
    """Rank 0's side. Errors in `add` wait for `finish`: other ranks are sending, and learn of them there."""

    def __init__(
        self, config: ModelConfig, out_dir: Path, dtype: torch.dtype, tokenizer_dir: str | Path | None, max_bytes: int, overwrite: bool
    ) -> None:
        self._config, self._out_dir, self._dtype, self._overwrite = config, out_dir, dtype, overwrite
        tokens = special_token_ids(tokenizer_dir) if tokenizer_dir is not None else None
        hf_config = config_to_hf(config, dtype=str(dtype).removeprefix("torch."), special_tokens=tokens)
        atomic.check_target(out_dir, overwrite=overwrite, marks=("config.json",))
        atomic.remove_stale(out_dir)
        self._work_dir = atomic.create_beside(out_dir)
        self._error: Exception | None = None
        (self._work_dir / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if (source := Path(tokenizer_dir or "") / name).is_file():
                shutil.copyfile(source, self._work_dir / name)
        self._missing = hf_shapes(config)
        self._writer = SafetensorsWriter(self._work_dir, max_file_bytes=max_bytes)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self._error is not None:
            return
        try:
            for name, weight in _hf_weights(key, tensor, self._config).items():
                if self._missing.pop(name, None) != tuple(weight.shape):
                    raise CheckpointError(f"{name} would be written as {tuple(weight.shape)}, which config.json contradicts")
                self._writer.add(name, weight.to(self._dtype))
        except (OSError, RuntimeError, ValueError) as error:
            self._error = error

    def finish(self) -> None:
        try:
            if self._error is not None:
                raise self._error
            if self._missing:
                raise CheckpointError(f"the ranks hold no {', '.join(self._missing)}: call export_hf on every rank, with all chunks")
            self._writer.close()
            atomic.publish(self._work_dir, self._out_dir, overwrite=self._overwrite, marks=("config.json",))
        finally:
            shutil.rmtree(self._work_dir, ignore_errors=True)


def _read(reader: SafetensorsReader, shard: Shard, config: ModelConfig) -> None:
    rows, columns = shard.index[0], shard.index[1:]
    covered = 0
    for piece in hf_pieces(shard.key, config):
        first, stop = max(rows.start, piece.row), min(rows.stop, piece.row + piece.num_rows)
        if first >= stop:
            continue
        hf_rows = slice(first - piece.row + piece.hf_row, stop - piece.row + piece.hf_row)
        shard.tensor[first - rows.start : stop - rows.start] = reader.read(piece.name, (hf_rows, *columns)).to(shard.tensor)
        covered = max(covered, stop - rows.start)
    shard.tensor[covered:].zero_()


def _hf_weights(key: str, tensor: torch.Tensor, config: ModelConfig) -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {}
    for piece in hf_pieces(key, config):
        rows.setdefault(piece.name, []).append(tensor[piece.row : piece.row + piece.num_rows])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _ignored(config: ModelConfig, names: set[str]) -> frozenset[str]:
    """What transformers ignores too: the head of a tied model, and the RoPE tables that old versions saved."""
    tied_head = {"lm_head.weight"} if config.tie_embeddings else set()
    return frozenset(tied_head | {name for name in names if name.endswith("rotary_emb.inv_freq")})


def _check_same(directory: str | Path, found: ModelConfig, built: ModelConfig) -> None:
    names = [f.name for f in fields(ModelConfig) if f.name not in _NO_MATTER_FOR_WEIGHTS and built.num_moe_experts is None]
    if built.num_moe_experts is not None:
        raise ConfigError(f"the model has {built.num_moe_experts} experts, {directory} holds a dense Llama")
    different = [n for n in names if n != "moe_router_topk" and getattr(found, n) != getattr(built, n)]
    if different:
        listed = "; ".join(f"{n}: {getattr(found, n)} in {directory}, {getattr(built, n)} in the model" for n in different)
        raise ConfigError(f"{listed}: build the model from config_from_hf of that directory")


def _refuse_quantized(chunks: Sequence[torch.nn.Module]) -> None:
    if any(type(module).__name__ == "TensorQuantizer" for chunk in chunks for module in chunk.modules()):
        raise ConfigError("the model has quantizers, which this export would drop: use nemo_opt.quantize, or export before quantizing")


def _named(action: Callable[[], None]) -> Callable[[], None]:
    """`action` with the errors of disk and files as this module's own."""

    def attempt() -> None:
        try:
            action()
        except (CheckpointError, ConfigError):
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"export failed: {type(error).__name__}: {error}") from error

    return attempt
