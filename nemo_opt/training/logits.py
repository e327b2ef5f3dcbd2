"""The logits of whole batches on rank 0, from a model at any layout: what two models are compared by."""

from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_opt.data.batches import cp_slice
from nemo_opt.device import local_device
from nemo_opt.models.sizes import model_config_of
from nemo_opt.training.losses import Batch

__all__ = ["gather_logits"]


def gather_logits(chunks: list[Any], batch: Batch) -> torch.Tensor | None:
    """Logits [B, S, V] of `batch` in float32 on the CPU of rank 0, without the rows that pad the vocabulary; None elsewhere. Collective.

    Args:
        chunks: This rank's chunks; they are put into evaluation mode for the pass.
        batch: tokens and position_ids [B, S] of the whole sequence, the same on every rank.

    """
    tokens_BS = batch["tokens"]
    assert tokens_BS is not None
    place_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
    mine = cp_slice({"tokens": tokens_BS, "position_ids": batch["position_ids"], "place": place_BS})
    logits = _run(chunks, {name: value.to(local_device()) for name, value in mine.items() if value is not None})
    if logits is not None:
        logits = _whole(logits, mine["place"])
    vocab_size = model_config_of(chunks).vocab_size
    whole = _to_first(logits)
    return None if whole is None else whole[..., :vocab_size].float().cpu()


def _run(chunks: list[Any], batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Logits of this rank's part of vocabulary and sequence, on the last stage."""
    kept: list[torch.Tensor] = []

    def keep(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kept.append(logits.detach())
        return logits.new_zeros(()), {}

    def step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(batch["tokens"], batch["position_ids"], None), keep

    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter([0]) for _ in chunks],
                model=chunks,
                num_microbatches=1,
                seq_length=batch["tokens"].shape[1] * parallel_state.get_context_parallel_world_size(),
                micro_batch_size=batch["tokens"].shape[0],
                forward_only=True,
            )
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
    return kept[0] if kept else None


def _whole(logits: torch.Tensor, place_BS: torch.Tensor | None) -> torch.Tensor:  # noqa: N803
    """All of the vocabulary and of the sequence, on every rank of the last stage."""
    whole = torch.cat(_gathered(logits, parallel_state.get_tensor_model_parallel_group()), dim=-1)
    if parallel_state.get_context_parallel_world_size() == 1:
        return whole
    assert place_BS is not None
    group = parallel_state.get_context_parallel_group()
    places = torch.cat(_gathered(place_BS[0].to(logits.device), group))
    return torch.cat(_gathered(whole, group), dim=1)[:, places.argsort()]


def _gathered(tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _to_first(logits: torch.Tensor | None) -> torch.Tensor | None:
    """From the last stage of rank 0's pipeline to rank 0; nothing moves in other pipelines."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return logits if dist.get_rank() == 0 else None
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    if ranks[0] != 0:
        return None
    shape = torch.zeros(3, dtype=torch.int64, device=local_device())
    if dist.get_rank() == ranks[-1]:
        assert logits is not None
        dist.send(torch.tensor(logits.shape, device=local_device()), dst=0)
        dist.send(logits.float().contiguous(), dst=0)
    elif dist.get_rank() == 0:
        dist.recv(shape, src=ranks[-1])
        received = torch.empty(shape.tolist(), dtype=torch.float32, device=local_device())
        dist.recv(received, src=ranks[-1])
        return received
    return None
