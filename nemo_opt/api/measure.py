"""evaluate(): the validation loss of a checkpoint at any layout, or of a Hugging Face directory without any of this package's models.

A directory with quantised weights is run by `quantize.reader`: transformers ignores ModelOpt's scales without a word.
"""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist

from nemo_opt.api import checks
from nemo_opt.api._session import directory_bytes, open_feed, session, world_size
from nemo_opt.api.results import EvalResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.data.config import DataConfig
from nemo_opt.device import choose_device, local_device
from nemo_opt.errors import CheckpointError
from nemo_opt.models.build import Spec
from nemo_opt.models.safetensors_dir import SafetensorsReader
from nemo_opt.parallel import Topology
from nemo_opt.quantize.reader import is_quantized, open_export

__all__ = ["evaluate"]

type _Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens and positions [B, S] -> logits [B, S, V]."""


def evaluate(
    *, path: str, data: DataConfig, topology: Topology, tokenizer: str | None = None, eval_batches: int = 32, spec: Spec | None = None
) -> EvalResult:
    """Mean loss over `eval_batches` validation micro-batches of each data parallel rank. Collective.

    A Hugging Face directory is evaluated by transformers, without any code of this package's model: an independent check of exports. If
    it is quantised, its scales are applied, and inputs and the KV cache rounded as it says.

    Raises:
        NemoOptError: A missing or damaged model, a quantised one that is not what it says of itself, or data or a layout that does not fit.

    """
    settings: dict[str, Any] = {"path": path, "data": data, "topology": topology, "tokenizer": tokenizer, "eval_batches": eval_batches}
    checks.check_evaluate(**settings, world_size=world_size())
    if checks.is_huggingface(path):
        return _evaluate_transformers(path, data, topology, tokenizer or path, eval_batches)
    info = read_info(path)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(path, job.topology, spec=spec)
        feed = open_feed(data, tokenizer or info.tokenizer_dir or path, eval_batches=eval_batches)
        loss = feed.loss(chunks)
        assert loss is not None
        return EvalResult(**job.facts(chunks), path=path, loss=loss, tokens=_tokens(data, job.topology, eval_batches))


def _tokens(data: DataConfig, topology: Topology, eval_batches: int) -> int:
    return eval_batches * data.micro_batch_size * (topology.dp or 1) * data.seq_length


def _evaluate_transformers(path: str, data: DataConfig, topology: Topology, tokenizer: str, eval_batches: int) -> EvalResult:
    start = time.perf_counter()
    logits, facts = _open_quantized(path) if is_quantized(path) else _open_plain(path)
    with session(topology) as job:
        feed = open_feed(data, tokenizer, eval_batches=eval_batches)
        choice = choose_device()
        loss = _mean_loss(logits, islice(feed.valid_batches(), eval_batches))
        return EvalResult(
            path=path,
            layout=job.topology.name,
            spec="transformers",
            device=f"{choice.type}/{choice.backend}",
            time_s=time.perf_counter() - start,
            loss=loss,
            tokens=_tokens(data, job.topology, eval_batches),
            bytes=directory_bytes(path),
            **facts,
        )


def _open_quantized(path: str) -> tuple[_Logits, dict[str, Any]]:
    """The model, and what is particular to its result."""
    exported = open_export(path, device=local_device())
    return exported.logits, {
        "parameters": exported.parameters,
        "formats": exported.formats,
        "bits_per_weight": exported.bits_per_weight,
        "bits_per_parameter": exported.bits_per_parameter,
    }


def _open_plain(path: str) -> tuple[_Logits, dict[str, Any]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    _refuse_hidden_scales(path)
    dtype = choose_device().dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).to(local_device()).eval()

    def logits(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return answer

    return logits, {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _refuse_hidden_scales(path: str) -> None:
    """Quantised weights without a description: transformers would load the codes as if they were weights."""
    reader = SafetensorsReader(path)
    weights = (name for name in reader.names if name.endswith((".weight", ".weight_packed")))
    if codes := sorted(name for name in weights if reader.dtype(name) not in ("F64", "F32", "F16", "BF16")):
        raise CheckpointError(
            f"{path}: {codes[0]} is {reader.dtype(codes[0])}, a quantised weight, but neither config.json (quantization_config) nor "
            "hf_quant_config.json says how: export it anew"
        )


def _mean_loss(logits: _Logits, batches: Iterable[Any]) -> float:
    """Mean cross-entropy over the valid tokens of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=local_device())
    with torch.no_grad():
        for batch in batches:
            logits_BSV = logits(batch["tokens"], batch["position_ids"])
            losses = torch.nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
            mask = batch["loss_mask"].flatten().double()
            sums += torch.stack([(losses.double() * mask).sum(), mask.sum()])
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / count
