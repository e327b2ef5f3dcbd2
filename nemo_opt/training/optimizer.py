"""Megatron-Core's data parallel wrapper, optimizer and learning rate schedule, set up so that gradients are means over tokens.

The wrapped model sums gradients over micro-batches and data parallel ranks; `finalize_model_grads` then divides by the global batch's
valid tokens. Both need `calculate_per_token_loss` before the wrapper is made, hence `wrap` sets it. Schedule steps are optimizer steps.
"""

from typing import Any

import nemo_opt._stack

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from nemo_opt.training.config import TrainingConfig

__all__ = ["build_optimizer", "finite_gradients", "wrap", "zero_gradients"]


def wrap(chunks: list[Any]) -> list[DistributedDataParallel]:
    """The chunks in Megatron-Core's DDP (and Float16Module for half precision); those wrapped already are returned as they are."""
    return [chunk if isinstance(chunk, DistributedDataParallel) else _wrap_chunk(chunk, index) for index, chunk in enumerate(chunks)]


def _wrap_chunk(chunk: Any, index: int) -> DistributedDataParallel:
    config = get_model_config(chunk)
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize_model_grads
    if (config.bf16 or config.fp16) and not isinstance(chunk, Float16Module):
        chunk = Float16Module(config, chunk)
    # The schedule reduces gradients once, after the last micro-batch; buckets pay with overlap only, from Megatron-Core's second chunk on.
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False)
    return DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)


def build_optimizer(chunks: list[DistributedDataParallel], config: TrainingConfig) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with decoupled weight decay for the wrapped chunks, and its schedule: linear warm-up, then a cosine to min_lr.

    The first step already learns: with a warm-up of n steps it uses lr / n. On resume the schedule's settings come from `config`, its
    position from the checkpoint.
    """
    model_config = get_model_config(chunks[0])
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model_config.bf16,
            fp16=model_config.fp16,
            params_dtype=model_config.params_dtype,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    for chunk in chunks:
        get_model_config(chunk).grad_scale_func = optimizer.scale_loss
    return optimizer, _build_scheduler(optimizer, config)


def _build_scheduler(optimizer: MegatronOptimizer, config: TrainingConfig) -> OptimizerParamScheduler:
    warmup = max(config.warmup_steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / warmup,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup - 1,
        lr_decay_steps=config.decay_steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def zero_gradients(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None = None) -> None:
    """Clear the gradients before a step."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()


def finite_gradients(chunks: list[DistributedDataParallel]) -> bool:
    """Whether every gradient of this rank is a finite number; one pass over the gradient buffers."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    # A sum of finite float32 values may overflow, the extremes cannot; they hand NaN on, and need no copy of the buffer.
    extremes = [torch.stack(torch.aminmax(buffer.grad_data)) for buffer in buffers if buffer.grad_data.numel()]
    return all(torch.isfinite(pair).all().item() for pair in extremes)
