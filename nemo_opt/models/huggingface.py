"""Hugging Face Llamas in and out of a GPTModel at any layout, without a process that holds the whole model.

Import: each rank reads the rows and columns of its own shards from the safetensors files. Export: `huggingface_writer` gathers and writes.
Unquantised models only: `nemo_opt.quantize.export` writes what quantization adds.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import nemo_opt._stack

import torch

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface_config import config_from_hf, config_to_hf, special_token_ids
from nemo_opt.models.huggingface_names import check_weights, hf_pieces, hf_shapes
from nemo_opt.models.huggingface_writer import TOKENIZER_FILES, HuggingFaceWriter, write_directory
from nemo_opt.models.safetensors_dir import SafetensorsReader
from nemo_opt.models.shards import Shard, parameter_shards
from nemo_opt.models.sizes import model_config_of, unwrap

__all__ = ["TOKENIZER_FILES", "config_from_hf", "export_hf", "hf_weights", "import_hf"]

_NO_MATTER_FOR_WEIGHTS = ("init_method_std", "max_position_embeddings")


def import_hf(directory: str | Path, chunks: Sequence[torch.nn.Module], *, any_vocabulary: bool = False) -> ModelConfig:
    """Fills the weights of this rank's chunks from a Hugging Face directory; rows that pad the vocabulary become zero.

    Args:
        directory: Holds `config.json` and safetensors files.
        chunks: A built model of the same sizes, at any layout, of either spec.
        any_vocabulary: Allow a model with another number of tokens: rows that the directory lacks become zero, those beyond are not read.

    Returns:
        The sizes that the directory announces.

    Raises:
        ConfigError: The directory holds no supported Llama, or one of other sizes than the model; names both.
        CheckpointError: Weights are missing, truncated, unexpected or of another shape; names them. The model is untouched.

    """
    config = config_from_hf(directory)
    built = model_config_of(chunks)
    _check_same(directory, config.with_(vocab_size=built.vocab_size) if any_vocabulary else config, built)
    reader = SafetensorsReader(directory)
    check_weights(reader, config)
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
    config = model_config_of(chunks)
    _refuse_quantized(chunks)
    stored = dtype or unwrap(chunks[0]).config.params_dtype

    def begin() -> HuggingFaceWriter:
        tokens = special_token_ids(tokenizer_dir) if tokenizer_dir is not None else None
        hf_config = config_to_hf(config, dtype=str(stored).removeprefix("torch."), special_tokens=tokens)
        return HuggingFaceWriter(
            Path(out_dir),
            {"config.json": hf_config},
            list(hf_shapes(config)),
            tokenizer_dir=tokenizer_dir,
            max_file_bytes=max_file_bytes,
            overwrite=overwrite,
        )

    def convert(key: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        return {name: {name: tensor.to(stored)} for name, tensor in hf_weights(key, weight, config).items()}

    write_directory(parameter_shards(chunks), begin, convert)
    return Path(out_dir)


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


def hf_weights(key: str, weight: torch.Tensor, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face weights by name, from the whole Megatron weight `key` (a `Shard.key`) or what has one entry for each row.

    Rows that lie together are a view of `weight`.

    Raises:
        ConfigError: A Llama has no such weight.
        CheckpointError: The weight is too small.

    """
    shapes = hf_shapes(config)
    rows: dict[str, list[torch.Tensor]] = {}
    for piece in hf_pieces(key, config):
        rows.setdefault(piece.name, []).append(weight[piece.row : piece.row + piece.num_rows])
    whole = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in rows.items()}
    for name, tensor in whole.items():
        if len(tensor) != shapes[name][0]:
            raise CheckpointError(f"{key} has rows for {len(tensor)} of the {shapes[name][0]} rows of {name}")
    return whole


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
