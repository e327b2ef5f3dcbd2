"""TensorRT-LLM checkpoints (`config.json` and `rank0.safetensors`, for `trtllm-build`), where ModelOpt 0.47 still writes them, and checked.

What was found in `modelopt.torch.export.export_tensorrt_llm_checkpoint`, and what follows:
- It reads a Megatron-Core model whose norms are modules of their own, the layer spec local; with Transformer Engine's spec it ends in
  `AttributeError: 'NoneType' object has no attribute 'eps'`. Block FP8 ends in an assertion. MXFP8 is in no engine that is built from it.
- It splits and merges ranks through files that all of them must see. That is refused here: TensorRT-LLM of today reads Hugging Face
  directories (`export_format="hf"`) and splits them itself.
- Of RoPE's scaling it writes the kind and not the numbers, so that engines take Llama 3.1's; they are put in here.
- Its files are read back, and every weight compared with the model's.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nemo_opt.checkpoint import atomic
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import hf_weights
from nemo_opt.models.shards import GATE_SUFFIX, UP_SUFFIX
from nemo_opt.models.sizes import model_config_of, spec_of, unwrap
from nemo_opt.quantize.export.artifacts import save_artifacts
from nemo_opt.quantize.export.formats import Kind, LinearFormat, linear_formats
from nemo_opt.quantize.reader.weights import LAYOUTS
from nemo_opt.quantize.sqnr import quantized_weights
from nemo_opt.quantize.tensors import quantizer_settings

__all__ = ["check_trtllm", "export_trtllm"]

_LAYOUTS = {Kind.FP8: "fp8", Kind.INT8: "int8", Kind.INT4: "int4_rows", Kind.W4A8: "w4a8", Kind.NVFP4: "nvfp4"}
"""What is written, by the name of `reader.weights.LAYOUTS`, whose packing is the same."""
_INSTEAD = "use export_format='hf', which TensorRT-LLM reads too, from any layout"
_MARKS = ("config.json",)
_LINEARS = {
    "attention.qkv": ("self_attention.linear_qkv", "", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attention.dense": ("self_attention.linear_proj", "", ("self_attn.o_proj",)),
    "mlp.fc": ("mlp.linear_fc1", GATE_SUFFIX, ("mlp.gate_proj",)),
    "mlp.gate": ("mlp.linear_fc1", UP_SUFFIX, ("mlp.up_proj",)),
    "mlp.proj": ("mlp.linear_fc2", "", ("mlp.down_proj",)),
}
"""TensorRT-LLM's linear -> Megatron's, the half of it, and Hugging Face's whose rows follow each other in it."""
_WEIGHT_ERROR = 1e-3
"""Relative (2-norm) error of a weight that is allowed: ModelOpt's exporter rounds by other expressions than its model.
Seen: 2.5e-4, one INT8 value on a rounding edge."""

Write = Callable[..., None]
"""ModelOpt's `export_tensorrt_llm_checkpoint`, or what stands for it."""


def check_trtllm(*, spec: str, world_size: int, inference_tp: int = 1, inference_pp: int = 1) -> None:
    """Refuses, before any work, what ModelOpt does not write, or not in a way that can be checked here.

    Args:
        spec: Layer spec of the model, te or local.
        world_size: Ranks.
        inference_tp: Tensor-parallel ranks to cut for.
        inference_pp: Pipeline stages to cut for.

    Raises:
        ConfigError: Names the obstacle and the alternative.

    """
    if spec != "local":
        raise ConfigError(f"ModelOpt writes TensorRT-LLM checkpoints of the layer spec local only, this model has {spec}: {_INSTEAD}")
    if world_size > 1:
        raise ConfigError(f"TensorRT-LLM checkpoints are written from one rank, here are {world_size}: {_INSTEAD}")
    if (inference_tp, inference_pp) != (1, 1):
        raise ConfigError(f"inference_tp {inference_tp}, inference_pp {inference_pp}: only 1, 1 is written in this form: {_INSTEAD}")


def export_trtllm(
    chunks: Sequence[torch.nn.Module],
    out_dir: str | Path,
    *,
    decoder_type: str | None = "llama",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_dir: str | Path | None = None,
    overwrite: bool = False,
    write: Write | None = None,
) -> Path:
    """Writes a quantised model as a TensorRT-LLM checkpoint, and compares what was written with the model.

    Args:
        chunks: The model, on one rank, of the layer spec local.
        out_dir: Must not exist, or be empty.
        decoder_type: ModelOpt's name of the architecture; only llama.
        dtype: Of what is not quantised: bfloat16 or float16.
        tokenizer_dir: Its files are copied.
        overwrite: Replace an older checkpoint.
        write: ModelOpt's function, for those who hold it under a name of their own.

    Raises:
        ConfigError: ModelOpt writes no such checkpoint of this model; names the alternative.
        CheckpointError: `out_dir` is not empty, ModelOpt failed, or what it wrote is another model; nothing is left behind.

    """
    model, out_dir = model_config_of(chunks), Path(out_dir)
    check_trtllm(spec=spec_of(chunks[0]), world_size=dist.get_world_size())
    if decoder_type not in (None, "llama"):
        raise ConfigError(f"decoder_type {decoder_type!r}: only llama is written")
    formats = linear_formats(quantizer_settings(chunks))
    if wrong := sorted(name for name, form in formats.items() if form.kind not in _LAYOUTS):
        raise ConfigError(f"TensorRT-LLM's engines have no {formats[wrong[0]].kind} in this form ({wrong[0]}): {_INSTEAD}")
    atomic.check_target(out_dir, overwrite=overwrite, marks=_MARKS)
    atomic.remove_stale(out_dir)
    work_dir = atomic.create_beside(out_dir)
    try:
        _write(write or _upstream(), unwrap(chunks[0]), dtype, work_dir)
        _complete_config(work_dir, model)
        _check_weights(work_dir, chunks, formats, model)
        save_artifacts(work_dir, tokenizer_dir=tokenizer_dir)
        atomic.publish(work_dir, out_dir, overwrite=overwrite, marks=_MARKS)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    return out_dir


def _upstream() -> Write:
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    return export_tensorrt_llm_checkpoint  # type: ignore[no-any-return]


def _write(write: Write, model: Any, dtype: torch.dtype, folder: Path) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of every layer
            write(model, "llama", dtype, str(folder), 1, 1)
    except Exception as error:
        raise CheckpointError(f"ModelOpt's TensorRT-LLM export failed: {type(error).__name__}: {error}; {_INSTEAD}") from error


def _complete_config(folder: Path, model: ModelConfig) -> None:
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_dim,
        "norm_epsilon": model.norm_epsilon,
        "rotary_base": model.rotary_base,
    }
    if wrong := {name: (written.get(name), value) for name, value in expected.items() if written.get(name) != value}:
        raise CheckpointError(f"ModelOpt wrote a config.json that is not the model's, (written, model): {wrong}; {_INSTEAD}")
    if model.rope_scaling is not None:
        written["rotary_scaling"] = {"type": "llama3", **asdict(model.rope_scaling)}
        (folder / "config.json").write_text(json.dumps(written, indent=4), encoding="utf-8")


def _check_weights(folder: Path, chunks: Sequence[torch.nn.Module], formats: Mapping[str, LinearFormat], model: ModelConfig) -> None:
    files = {name: tensor for path in sorted(folder.glob("rank*.safetensors")) for name, tensor in load_file(path).items()}
    fake = {name.removesuffix(".weight_quantizer"): quantizer(weight).detach() for name, weight, quantizer in quantized_weights(chunks)}
    for layer in range(model.num_layers):
        for theirs, (megatron, half, rows) in _LINEARS.items():
            linear, name = f"decoder.layers.{layer}.{megatron}", f"transformer.layers.{layer}.{theirs}"
            if linear not in formats:
                continue
            memory = fake[linear].chunk(2)[half == UP_SUFFIX] if half else fake[linear]
            parts = hf_weights(f"{linear}.weight{half}", memory, model)
            expected = torch.cat([parts[f"model.layers.{layer}.{part}.weight"] for part in rows])
            error = float((_decoded(files, name, formats[linear]) - expected).norm() / expected.norm())
            if not error <= _WEIGHT_ERROR:
                raise CheckpointError(f"ModelOpt wrote {name} with a relative error of {error:.2g}, at most {_WEIGHT_ERROR} is allowed")


def _decoded(files: Mapping[str, torch.Tensor], name: str, form: LinearFormat) -> torch.Tensor:
    names = {"weight": "weight", "weight_scale": "weights_scaling_factor", "weight_scale_2": "weights_scaling_factor_2"}
    tensors = {ours: files[f"{name}.{theirs}"] for ours, theirs in names.items() if f"{name}.{theirs}" in files}
    if form.kind in (Kind.INT4, Kind.W4A8):
        tensors["weight"] = tensors["weight"].view(torch.uint8)
    return LAYOUTS[_LAYOUTS[form.kind]].decode(tensors, form.block)
