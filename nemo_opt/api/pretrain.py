"""train(): a model from its sizes, or from a checkpoint."""

import math
from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks, resumable
from nemo_opt.api._session import open_feed, session, world_size
from nemo_opt.api.results import TrainResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.data.config import DataConfig
from nemo_opt.models.build import Spec, build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.loop import TrainingRun
from nemo_opt.training.loop import train as run_training

__all__ = ["train"]


def train(
    *,
    output: str,
    data: DataConfig,
    training: TrainingConfig,
    topology: Topology,
    model: ModelConfig | None = None,
    checkpoint: str | None = None,
    resume: bool = False,
    tokenizer: str | None = None,
    spec: Spec | None = None,
    log_dir: str | None = None,
    save_interval: int = 0,
    save_optimizer: bool = True,
    overwrite: bool = False,
) -> TrainResult:
    """Trains a model on text and writes a checkpoint. Collective.

    Args:
        output: Directory to write.
        data: The text; its batch sizes and sequence length equal those of `training`.
        training: Steps, batch sizes, learning rate.
        topology: The layout.
        model: Sizes of a new model; excludes `checkpoint`.
        checkpoint: Weights to start from.
        resume: Also take optimizer, schedule and position from `checkpoint`.
        tokenizer: Its directory; the checkpoint's own by default.
        spec: Layer spec, "te" or "local"; the device's default when None.
        log_dir: Where metrics.jsonl is written.
        save_interval: Steps between checkpoints to resume from, each replacing the last one at `<output>-resume`; 0 writes none. The last
            one is removed when the output is in place.
        save_optimizer: Whether the checkpoint can be resumed from.
        overwrite: Replace an existing output.

    Raises:
        NemoOptError: Bad settings or data, before any step.

    """
    settings: dict[str, Any] = {"model": model, "checkpoint": checkpoint, "resume": resume, "tokenizer": tokenizer, "overwrite": overwrite}
    settings["save_interval"] = save_interval
    checks.check_train(output=output, data=data, training=training, topology=topology, world_size=world_size(), **settings)
    info = read_info(checkpoint) if checkpoint is not None else None
    sizes = info.model if info is not None else model
    assert sizes is not None
    tokenizer_dir = tokenizer or (info.tokenizer_dir if info is not None else None)
    assert tokenizer_dir is not None
    with session(topology, sizes, seed=training.seed) as job:
        if info is not None and not resume:
            chunks, _ = restore_model(info.path, job.topology, spec=spec)
        else:
            chunks = build_model(sizes, job.topology, spec=spec, seed=training.seed)
        feed = open_feed(
            data, tokenizer_dir, train_samples=training.max_steps * training.global_batch_size, eval_batches=training.limit_val_batches
        )

        def save(run: TrainingRun) -> None:
            if save_optimizer:
                run.save(output, tokenizer_dir=tokenizer_dir, extra=resumable.marks("train"), overwrite=overwrite)
            else:
                position: dict[str, Any] = {"iteration": run.iteration, "consumed_samples": run.consumed_samples}
                save_checkpoint(output, run.chunks, topology=job.topology, tokenizer_dir=tokenizer_dir, overwrite=overwrite, **position)

        result = run_training(
            chunks,
            config=training,
            topology=job.topology,
            train_batches=feed.train_batches,
            valid_batches_fn=feed.valid_batches if training.limit_val_batches else None,
            log_dir=log_dir,
            resume=checkpoint if resume else None,
            on_interval=lambda run: resumable.save(run, output, "train", tokenizer_dir),
            interval=save_interval,
            on_end=save,
        )
        resumable.clear(output, wrote=save_interval > 0, source=checkpoint if resume else None)
        return TrainResult(
            **job.facts(chunks),
            path=output,
            steps=training.max_steps,
            loss_first=result.losses[0],
            loss_last=result.losses[-1],
            loss_after=result.validation_loss,
            loss_uniform=math.log(sizes.vocab_size),
            tokens_per_s=result.tokens_per_s,
            peak_memory_bytes=result.peak_memory_bytes,
            resumable=output if save_optimizer else None,
        )
