"""TensorRT-LLM checkpoints, as far as ModelOpt 0.47 still writes them: whole, or not at all.

ModelOpt has deprecated this format in favour of Hugging Face directories, which TensorRT-LLM reads as well (`export_format="hf"`), and what
remains of it is narrow: it does not know Transformer Engine's modules, whose norms are fused into the linear after them; it takes all ranks
of the world for tensor and pipeline parallel ones; and where it fails it only warns, and leaves a file of another kind. So layouts are
checked first, and the files afterwards.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
from safetensors import safe_open

from nemo_opt.checkpoint import atomic
from nemo_opt.collective import on_first
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.build import spec_of, unwrap
from nemo_opt.parallel import Topology
from nemo_opt.quantize.export.artifacts import save_artifacts

__all__ = ["export_trtllm"]

_INSTEAD = "use export_format='hf', which TensorRT-LLM reads too"
_MARKS = ("config.json",)


def export_trtllm(
    model: Any,
    out_dir: Path,
    write: Callable[..., None],
    *,
    topology: Topology,
    decoder_type: str,
    dtype: torch.dtype,
    inference_tp: int,
    inference_pp: int,
    tokenizer_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a TensorRT-LLM checkpoint by ModelOpt's `export_tensorrt_llm_checkpoint`. Collective.

    Args:
        model: a quantised GPTModel of the layer spec local, on one rank.
        out_dir: must not exist, or be empty.
        write: ModelOpt's function.
        topology: the model's layout.
        decoder_type: kind of decoder, such as llama.
        dtype: of what is not quantised.
        inference_tp: tensor parallel ranks of the engine.
        inference_pp: pipeline stages of the engine.
        tokenizer_dir: its files are copied.
        overwrite: replace an older one, once the new one is whole.

    Raises:
        ConfigError: a layout or spec that ModelOpt does not write; names the alternative.
        CheckpointError: ModelOpt has not written what was asked for; nothing is left behind.

    """
    _check(model, topology, dtype)
    work_dir = on_first(lambda: _begin(out_dir, overwrite))
    sizes = {"inference_tensor_parallel": inference_tp, "inference_pipeline_parallel": inference_pp}
    try:
        write(model=unwrap(model), decoder_type=decoder_type, dtype=dtype, export_dir=work_dir, **sizes)
        on_first(lambda: _check_files(work_dir, inference_tp * inference_pp))
        save_artifacts(work_dir, tokenizer_dir=tokenizer_dir)
        on_first(lambda: atomic.publish(work_dir, out_dir, overwrite=overwrite, marks=_MARKS))
    finally:
        on_first(lambda: shutil.rmtree(work_dir, ignore_errors=True))
    return out_dir


def _check(model: Any, topology: Topology, dtype: torch.dtype) -> None:
    if topology.world_size > 1:
        raise ConfigError(f"export_format 'trtllm' is written from one rank, not from {topology.name}: {_INSTEAD}, or export at TP1PP1")
    if spec_of(model) != "local":
        raise ConfigError(f"ModelOpt writes no TensorRT-LLM checkpoint of the layer spec te: quantise with spec local, or {_INSTEAD}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"TensorRT-LLM checkpoints hold float16 or bfloat16, not {dtype}")


def _begin(out_dir: Path, overwrite: bool) -> Path:
    atomic.check_target(out_dir, overwrite=overwrite, marks=_MARKS)
    atomic.remove_stale(out_dir)
    return atomic.create_beside(out_dir)


def _check_files(directory: Path, ranks: int) -> None:
    """The description, and a whole file of finite weights with their scales for every rank of the engine."""
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"ModelOpt wrote no config.json: {_INSTEAD}")
    quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization", {})
    for rank in range(ranks):
        file = directory / f"rank{rank}.safetensors"
        if not file.is_file():
            raise CheckpointError(f"ModelOpt wrote no {file.name} for an engine of {ranks} ranks: {_INSTEAD}")
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            bad = [name for name in names if not math.isfinite(float(weights.get_tensor(name).float().sum()))]
        if bad:
            raise CheckpointError(f"{file.name} holds {len(bad)} tensors that are not finite, first {bad[0]}: {_INSTEAD}")
        if quantization.get("quant_algo") is None or not any(name.endswith("weights_scaling_factor") for name in names):
            raise CheckpointError(f"{file.name} is not quantised ({quantization}): {_INSTEAD}")
