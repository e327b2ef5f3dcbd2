"""evaluate(): the validation loss of a checkpoint at any layout, or of a Hugging Face directory by transformers itself."""

import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist

from nemo_opt.api import checks
from nemo_opt.api._session import open_feed, session, world_size
from nemo_opt.api.results import EvalResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.data.config import DataConfig
from nemo_opt.device import choose_device, local_device
from nemo_opt.models.build import Spec
from nemo_opt.parallel import Topology

__all__ = ["evaluate"]


def evaluate(
    *, path: str, data: DataConfig, topology: Topology, tokenizer: str | None = None, eval_batches: int = 32, spec: Spec | None = None
) -> EvalResult:
    """Mean loss over `eval_batches` validation micro-batches of each data parallel rank. Collective.

    A Hugging Face directory is evaluated by transformers, without any code of this package's model: an independent check of exports.

    Raises:
        NemoOptError: A missing or damaged model, or data or a layout that does not fit.

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
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    with session(topology) as job:
        feed = open_feed(data, tokenizer, eval_batches=eval_batches)
        choice = choose_device()
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=choice.dtype, local_files_only=True).to(local_device()).eval()
        loss = _mean_loss(model, islice(feed.valid_batches(), eval_batches))
        return EvalResult(
            path=path,
            layout=job.topology.name,
            spec="transformers",
            device=f"{choice.type}/{choice.backend}",
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            time_s=time.perf_counter() - start,
            loss=loss,
            tokens=_tokens(data, job.topology, eval_batches),
        )


def _mean_loss(model: Any, batches: Iterable[Any]) -> float:
    """Mean cross-entropy over the valid tokens of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=local_device())
    with torch.no_grad():
        for batch in batches:
            logits_BSV = model(input_ids=batch["tokens"], position_ids=batch["position_ids"], use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
            mask = batch["loss_mask"].flatten().double()
            sums += torch.stack([(losses.double() * mask).sum(), mask.sum()])
    dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / count
