"""The training loop: steps, validation, the metrics log, resume. `train` is the call for most; `TrainingRun` for who needs the parts.

Decisions:
- A NaN or infinite loss or gradient ends the run on every rank with the step, the ranks where it arose and what they know of its cause,
  before the weights change.
- Data is asked for by the number of samples consumed so far, so that a resumed run continues where the first one stopped.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.utils import get_model_config
from tqdm import tqdm

from nemo_opt.collective import on_each
from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError, NemoOptError
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.evaluate import evaluate
from nemo_opt.training.losses import Batch, LossFunction
from nemo_opt.training.metrics_log import MetricsLog
from nemo_opt.training.optimizer import build_optimizer, finite_gradients, wrap, zero_gradients
from nemo_opt.training.step import MegatronStep

__all__ = ["DivergedError", "TrainingResult", "TrainingRun", "train"]


class DivergedError(NemoOptError, ArithmeticError):
    """The loss or a gradient is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a call of `train` did."""

    history: list[dict[str, float]]
    """Of each step of this call: step, the loss function's metrics, grad_norm, lr, tokens_per_s, step_time_s, and validation_loss where one
    was measured after it. Equal on every rank, times excepted."""
    tokens_per_s: float
    """Over all ranks; validation and saving are not counted."""
    step_time_s: float
    """Mean time of a step."""
    peak_memory_bytes: int
    """The most that any rank held at a time: allocated on a GPU, resident in main memory without one."""

    @property
    def steps(self) -> int:
        """Optimizer steps of this call."""
        return len(self.history)

    @property
    def losses(self) -> list[float]:
        """Loss of each step (nats per token)."""
        return [row["loss"] for row in self.history]

    @property
    def validation_losses(self) -> dict[int, float]:
        """Validation loss by the step after which it was measured."""
        return {int(row["step"]): row["validation_loss"] for row in self.history if "validation_loss" in row}

    @property
    def validation_loss(self) -> float | None:
        """The last one of them; None where validation is off."""
        return next(reversed(self.validation_losses.values()), None)


@dataclass(kw_only=True)
class TrainingRun:
    """A model with its optimizer, schedule and position. The chunks are wrapped on construction."""

    chunks: list[Any]
    config: TrainingConfig
    topology: Topology
    loss_fn: LossFunction | None = None
    explain: Callable[[], str | None] | None = None
    """Called on every rank when a loss or a gradient is not finite: what this rank knows of the cause; None for nothing."""
    iteration: int = 0
    """Steps done so far."""
    consumed_samples: int = 0
    """Training samples used so far over all ranks."""
    optimizer: Any = field(init=False)
    scheduler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.config.validate(self.topology)
        self.num_microbatches = self.config.num_microbatches(self.topology.dp or 1)
        _check_experts(self.chunks[0])
        self.chunks = wrap(self.chunks)
        self.optimizer, self.scheduler = build_optimizer(self.chunks, self.config)

    def resume(self, path: str | Path) -> None:
        """Load weights, optimizer, schedule and position from a checkpoint that holds them."""
        from nemo_opt.checkpoint.load import load_checkpoint

        info = load_checkpoint(Path(path), self.chunks, optimizer=self.optimizer, scheduler=self.scheduler)
        self.iteration, self.consumed_samples = info.iteration, info.consumed_samples

    def save(self, path: str | Path, **arguments: Any) -> None:
        """Write a checkpoint from which `resume` continues; arguments are those of `save_checkpoint`."""
        from nemo_opt.checkpoint.save import save_checkpoint

        save_checkpoint(
            Path(path),
            self.chunks,
            topology=self.topology,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            **arguments,
        )

    def step(self, data_iterator: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step; returns the metrics with grad_norm and lr.

        Raises:
            DivergedError: The loss or a gradient is not finite on some rank. The weights are left as they were.

        """
        zero_gradients(self.chunks, self.optimizer)
        forward_backward = MegatronStep(
            model=self.chunks,
            data_iterator=data_iterator,
            loss_fn=self.loss_fn,
            seq_length=self.config.seq_length,
            micro_batch_size=self.config.micro_batch_size,
            num_microbatches=self.num_microbatches,
        )
        metrics = forward_backward()
        self._require_finite(forward_backward.local_loss_is_finite)
        lr = get_canonical_lr_for_logging(self.optimizer.param_groups)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        self.iteration += 1
        self.consumed_samples += self.config.global_batch_size
        return metrics | {"grad_norm": float(grad_norm or 0.0), "lr": float(lr or 0.0)}

    def _require_finite(self, loss_is_finite: bool) -> None:
        flags = torch.tensor([[float(loss_is_finite), float(finite_gradients(self.chunks))]], device=local_device())
        everyone = torch.empty(dist.get_world_size(), 2, device=local_device())
        dist.all_gather_into_tensor(everyone, flags)
        for name, column in (("loss", 0), ("gradient", 1)):
            if ranks := [rank for rank, ok in enumerate(everyone[:, column].tolist()) if not ok]:
                raise DivergedError(f"the {name} of step {self.iteration + 1} is not finite on rank {ranks}: {self._causes()}")

    def _causes(self) -> str:
        """What the ranks know of a divergence, or advice where they know nothing. Collective."""
        ranks: dict[str, list[int]] = {}
        for rank, cause in enumerate(on_each(self.explain) if self.explain is not None else []):
            if cause is not None:
                ranks.setdefault(cause, []).append(rank)
        return "; ".join(f"{cause} on rank {found}" for cause, found in ranks.items()) or "lower lr or look at the data"


def _check_experts(chunk: Any) -> None:
    config = get_model_config(chunk)
    tp = config.tensor_model_parallel_size
    if config.num_moe_experts is not None and tp > 1 and not config.sequence_parallel:
        raise ConfigError(f"training experts with tp {tp} needs sequence parallelism (Megatron-Core refuses it without): set sp")


def train(
    chunks: list[Any],
    *,
    config: TrainingConfig,
    topology: Topology,
    train_batches: Callable[[int], Iterable[Batch]],
    valid_batches_fn: Callable[[], Iterable[Batch]] | None = None,
    loss_fn: LossFunction | None = None,
    log_dir: str | Path | None = None,
    resume: str | Path | None = None,
    explain: Callable[[], str | None] | None = None,
    on_start: Callable[[TrainingRun], None] | None = None,
    on_interval: Callable[[TrainingRun], None] | None = None,
    interval: int = 0,
    on_end: Callable[[TrainingRun], None] | None = None,
) -> TrainingResult:
    """Train up to `config.max_steps`. Collective.

    Args:
        chunks: This rank's part of the model; its weights are changed in place.
        config: Steps, batch sizes, learning rate.
        topology: The resolved layout that is set up.
        train_batches: Given the samples consumed so far, the micro-batches of this data parallel rank from there on.
        valid_batches_fn: The validation micro-batches, from the first one.
        loss_fn: See `nemo_opt.training.losses`.
        log_dir: Where rank 0 writes metrics.jsonl.
        resume: A checkpoint with optimizer state.
        explain: Says on each rank what made a loss or a gradient infinite or NaN, for the error's message.
        on_start: Called before the first step.
        on_interval: Called after every `interval`-th step but the last one, for instance to save; never where `interval` is 0.
        interval: See `on_interval`.
        on_end: Called after the last step and validation, for instance to save.

    Raises:
        ConfigError: The batch or the sequence does not fit the layout, or the checkpoint to resume from is past the last step.
        DataError: The data ends early.
        DivergedError: The loss or a gradient is not finite.

    """
    torch.cuda.reset_peak_memory_stats()
    run = TrainingRun(chunks=chunks, config=config, topology=topology, loss_fn=loss_fn, explain=explain)
    if resume is not None:
        run.resume(resume)
        if run.iteration >= config.max_steps:
            raise ConfigError(f"{resume} is at step {run.iteration} already, max_steps is {config.max_steps}: raise max_steps")
    if on_start is not None:
        on_start(run)
    log = MetricsLog(log_dir, after=run.iteration)
    history: list[dict[str, float]] = []
    try:
        for row in _rows(run, iter(train_batches(run.consumed_samples)), valid_batches_fn, log):
            history.append(row)
            if on_interval is not None and interval and run.iteration % interval == 0 and run.iteration < config.max_steps:
                on_interval(run)
    finally:
        log.close()
    time_s = sum(row["step_time_s"] for row in history)
    result = TrainingResult(
        history=history,
        tokens_per_s=len(history) * config.global_batch_size * config.seq_length / time_s if time_s else 0.0,
        step_time_s=time_s / len(history) if history else math.nan,
        peak_memory_bytes=_peak_memory_bytes(),
    )
    if on_end is not None:
        on_end(run)
    return result


def _rows(
    run: TrainingRun, data: Iterator[Batch], valid_batches_fn: Callable[[], Iterable[Batch]] | None, log: MetricsLog
) -> Iterator[dict[str, float]]:
    """Trains to the last step; the row of each step, with the loss of the validation after it where one was due."""
    config = run.config
    bar = _progress(range(run.iteration, config.max_steps))
    for _ in bar:
        start = time.perf_counter()
        metrics = run.step(data)
        duration = time.perf_counter() - start
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
        speed = {"tokens_per_s": config.global_batch_size * config.seq_length / duration, "step_time_s": duration}
        row = {"step": run.iteration, **metrics, **speed}
        if run.iteration % config.log_interval == 0 or run.iteration == config.max_steps:
            log.write(**row)
        if valid_batches_fn is not None and _validation_is_due(config, run.iteration):
            row["validation_loss"] = evaluate(run.chunks, valid_batches_fn(), config.limit_val_batches)
            log.write(step=run.iteration, validation_loss=row["validation_loss"])
        yield row


def _peak_memory_bytes() -> int:
    """The largest over all ranks since it was reset."""
    peak = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.int64, device=local_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())


def _validation_is_due(config: TrainingConfig, step: int) -> bool:
    if config.limit_val_batches == 0:
        return False
    return step == config.max_steps or (config.val_check_interval > 0 and step % config.val_check_interval == 0)


def _progress(steps: range) -> "tqdm[int]":
    """A bar for a person: on rank 0, where stderr is a terminal."""
    hidden = dist.get_rank() != 0 or not sys.stderr.isatty()
    return tqdm(steps, desc="train", unit="step", initial=steps.start, total=steps.stop, disable=hidden)
