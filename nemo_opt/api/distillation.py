"""distill(): a student learns a teacher's answers; the losses of both, before and after, on the same validation batches."""

from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks
from nemo_opt.api._session import open_feed, session, world_size
from nemo_opt.api.results import DistillResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.data.config import DataConfig
from nemo_opt.distill.config import DistillationConfig, load_distillation_config
from nemo_opt.distill.convert import convert_to_distillation_model, export_student
from nemo_opt.distill.losses import distillation_loss_fn
from nemo_opt.distill.provider import teacher_provider
from nemo_opt.models.build import Spec
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.loop import train as run_training

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
    overwrite: bool = False,
) -> DistillResult:
    """Distils a teacher into a student and writes the student as an ordinary checkpoint, without the teacher. Collective.

    Args:
        student: Checkpoint to train.
        teacher: Checkpoint to learn from; other sizes, the same vocabulary.
        output: Directory to write.
        data: The text; its batch sizes and sequence length equal those of `training`.
        training: Steps, batch sizes, learning rate.
        topology: The layout of both models.
        distillation: What to learn: settings, a YAML file as NeMo's, or None for the logits alone.
        tokenizer: Its directory; the student's own by default.
        eval_batches: Validation micro-batches for the losses; 0 measures none.
        spec: Layer spec, "te" or "local"; the device's default when None.
        log_dir: Where metrics.jsonl is written.
        overwrite: Replace an existing output.

    Raises:
        NemoOptError: Bad settings, damaged checkpoints or unsuitable data.

    """
    settings: dict[str, Any] = {"tokenizer": tokenizer, "distillation": distillation, "eval_batches": eval_batches, "overwrite": overwrite}
    settings |= {"data": data, "training": training, "topology": topology}
    checks.check_distill(student=student, teacher=teacher, output=output, world_size=world_size(), **settings)
    info = read_info(student)
    tokenizer_dir = checks.tokenizer_directory(info, tokenizer)
    if not isinstance(distillation, DistillationConfig):
        distillation = load_distillation_config(distillation, info.model, read_info(teacher).model)
    with session(topology, info.model, seed=training.seed) as job:
        chunks, _ = restore_model(student, job.topology, spec=spec)
        teacher_model = teacher_provider(None, teacher, tokenizer_dir, spec=spec)
        samples = training.max_steps * training.global_batch_size
        # A validation on the way costs a pass of the student; the last one is made below, with the teacher's and the first.
        on_the_way = training.limit_val_batches if 0 < training.val_check_interval < training.max_steps else 0
        feed = open_feed(data, tokenizer_dir, train_samples=samples, eval_batches=eval_batches, spare_batches=on_the_way)
        teacher_loss, loss_before = feed.loss([teacher_model]), feed.loss(chunks)
        result = run_training(
            convert_to_distillation_model(chunks, teacher_model, distillation),
            config=training,
            topology=job.topology,
            train_batches=feed.train_batches,
            valid_batches_fn=feed.valid_batches if on_the_way else None,
            loss_fn=distillation_loss_fn,
            log_dir=log_dir,
        )
        chunks = export_student(chunks)
        loss_after = feed.loss(chunks)
        position: dict[str, Any] = {"iteration": training.max_steps, "consumed_samples": samples}
        save_checkpoint(output, chunks, topology=job.topology, tokenizer_dir=tokenizer_dir, overwrite=overwrite, **position)
        return DistillResult(
            **job.facts(chunks),
            path=output,
            steps=result.steps,
            teacher=teacher,
            teacher_loss=teacher_loss,
            loss_before=loss_before,
            loss_after=loss_after,
            kd_loss_first=result.losses[0],
            kd_loss_last=result.losses[-1],
            tokens_per_s=result.tokens_per_s,
        )
