"""distill(): a student learns a teacher's answers; the losses of both, before and after, on the same validation batches."""

from pathlib import Path
from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks, resumable
from nemo_opt.api._session import open_feed, session, world_size
from nemo_opt.api.results import DistillResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig
from nemo_opt.distill.config import DistillationConfig, load_distillation_config
from nemo_opt.distill.convert import convert_to_distillation_model, export_student
from nemo_opt.distill.losses import cause_of_divergence, distillation_loss_fn
from nemo_opt.distill.provider import teacher_provider
from nemo_opt.models.build import Spec
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.loop import TrainingResult
from nemo_opt.training.loop import train as run_training
from nemo_opt.training.metrics_log import read_metrics

__all__ = ["distill"]


def distill(
    *,
    student: str,
    teacher: str,
    output: str,
    data: DataConfig,
    training: TrainingConfig,
    topology: Topology,
    distillation: DistillationConfig | str | None = None,
    tokenizer: str | None = None,
    eval_batches: int = 8,
    spec: Spec | None = None,
    log_dir: str | None = None,
    resume: bool = False,
    save_interval: int = 0,
    save_optimizer: bool = False,
    report: str | None = None,
    overwrite: bool = False,
) -> DistillResult:
    """Distils a teacher into a student and writes the student as an ordinary checkpoint, without the teacher. Collective.

    Args:
        student: Checkpoint to train; it may be quantised.
        teacher: Checkpoint or Hugging Face directory to learn from; other sizes, the same tokens.
        output: Directory to write.
        data: The text; its batch sizes and sequence length equal those of `training`.
        training: Steps, batch sizes, learning rate.
        topology: The layout of both models.
        distillation: What to learn: settings, a YAML file as NeMo's, or None for the logits alone.
        tokenizer: Its directory; the student's own by default.
        eval_batches: Validation micro-batches for the losses; 0 measures none.
        spec: Layer spec, "te" or "local"; the device's default when None.
        log_dir: Where metrics.jsonl is written.
        resume: Also take optimizer, schedule, projection and position from `student`, which an interrupted distillation has left. With the
            settings of that one, the rest is what it would have been (to the bit at the same layout).
        save_interval: Steps between checkpoints to resume from, each replacing the last one at `<output>-resume`; 0 writes none. The last
            one is removed when the output is in place.
        save_optimizer: Write the output so that a later call can resume from it, to train for more steps.
        report: An HTML page of the losses to write.
        overwrite: Replace an existing output, and what an interrupted run has left.

    Raises:
        NemoOptError: Bad settings, damaged checkpoints or unsuitable data.

    """
    settings: dict[str, Any] = {"tokenizer": tokenizer, "distillation": distillation, "eval_batches": eval_batches, "overwrite": overwrite}
    settings |= {"data": data, "training": training, "topology": topology}
    settings |= {"resume": resume, "save_interval": save_interval, "report": report}
    checks.check_distill(student=student, teacher=teacher, output=output, world_size=world_size(), **settings)
    info = read_info(student)
    tokenizer_dir = checks.tokenizer_directory(info, tokenizer)
    if not isinstance(distillation, DistillationConfig):
        distillation = load_distillation_config(distillation, info.model, checks.teacher_sizes(teacher))
    with session(topology, info.model, seed=training.seed) as job:
        chunks, _ = restore_model(student, job.topology, spec=spec)
        teacher_model = teacher_provider(None, teacher, tokenizer_dir, spec=spec, vocab_size=info.model.vocab_size)
        samples = training.max_steps * training.global_batch_size
        # A validation on the way costs a pass of the student; the last one is made below, with the teacher's and the first.
        on_the_way = training.limit_val_batches if 0 < training.val_check_interval < training.max_steps else 0
        feed = open_feed(data, tokenizer_dir, train_samples=samples, eval_batches=eval_batches, spare_batches=on_the_way)
        teacher_loss, loss_before = feed.loss([teacher_model], "the teacher"), feed.loss(chunks, "the student")
        distilled = convert_to_distillation_model(chunks, teacher_model, distillation)
        written: dict[str, Any] = {"tokenizer_dir": tokenizer_dir, "overwrite": overwrite}
        trained = run_training(
            distilled,
            config=training,
            topology=job.topology,
            train_batches=feed.train_batches,
            valid_batches_fn=feed.valid_batches if on_the_way else None,
            loss_fn=distillation_loss_fn,
            log_dir=log_dir,
            resume=student if resume else None,
            explain=lambda: cause_of_divergence(distilled),
            on_interval=lambda run: resumable.save(run, output, "distill", tokenizer_dir),
            interval=save_interval,
            on_end=(lambda run: run.save(output, extra=resumable.marks("distill"), **written)) if save_optimizer else None,
        )
        chunks = export_student(distilled)
        loss_after = feed.loss(chunks, "the student")
        if not save_optimizer:
            position: dict[str, Any] = {"iteration": training.max_steps, "consumed_samples": samples}
            save_checkpoint(output, chunks, topology=job.topology, **written, **position)
        resumable.clear(output, wrote=save_interval > 0, source=student if resume else None)
        result = DistillResult(
            **job.facts(chunks),
            **_numbers(trained, training.max_steps),
            path=output,
            teacher=teacher,
            teacher_loss=teacher_loss,
            loss_before=loss_before,
            loss_after=loss_after,
            resumable=output if save_optimizer else None,
        )
        if report is not None:
            _write_report(report, result, trained, log_dir)
        return result


def _numbers(trained: TrainingResult, max_steps: int) -> dict[str, Any]:
    """The fields of `DistillResult` that the training knows."""
    names = ("kd_loss", "logits_loss", "intermediate_loss", "lm_loss")
    ends = {"first": trained.history[0], "last": trained.history[-1]}
    return {
        **{f"{name}_{end}": row.get(name) for name in names for end, row in ends.items()},
        "steps": max_steps,
        "resumed_at": max_steps - trained.steps,
        "validation_losses": {str(step): loss for step, loss in trained.validation_losses.items()},
        "tokens_per_s": trained.tokens_per_s,
        "peak_memory_bytes": trained.peak_memory_bytes,
    }


def _write_report(path: str, result: DistillResult, trained: TrainingResult, log_dir: str | None) -> None:
    """The page of the losses, of the steps before a resume too where their log is at hand."""
    from nemo_opt.distill.report import write_report

    def write() -> None:
        before = [line for line in read_metrics(log_dir) if line["step"] <= result.resumed_at] if log_dir is not None else []
        write_report(Path(path), result.to_dict(), [*before, *trained.history])

    on_first(write)
