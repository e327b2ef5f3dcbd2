"""From a student and a teacher to one distillation model that Megatron-Core runs, and back to the student."""

from collections.abc import Sequence
from typing import Any

import nemo_opt._stack

import modelopt.torch.distill as mtd
from megatron.core.models.gpt import GPTModel
from modelopt.torch.utils.network import init_model_from_model_like

from nemo_opt.distill.adjust import adjust_distillation_model_for_mcore, distillation_model, remove_adjustments
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.criterion import LossBalancer, build_criterion
from nemo_opt.distill.provider import compared_vocabulary
from nemo_opt.errors import ConfigError
from nemo_opt.models.build import model_config_of, unwrap
from nemo_opt.parallel import Topology

__all__ = ["convert_to_distillation_model", "export_student"]

_SAME_IN_BOTH = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
                 "sequence_parallel", "params_dtype", "pipeline_dtype", "variable_seq_lengths")  # fmt: skip


def convert_to_distillation_model(student_chunks: Any, teacher: Any, distill_cfg: DistillationConfig) -> list[GPTModel]:
    """Joins the student's chunk with the teacher, in place; collective. Wrap the result in DDP afterwards.

    Args:
        student_chunks: the student's one chunk of this rank, not wrapped.
        teacher: its chunk of this rank, or what ModelOpt makes one of: `(teacher_provider, args, kwargs)`.
        distill_cfg: what to learn.

    Returns:
        The list of the one chunk; train it with `distillation_loss_fn`.

    Raises:
        ConfigError: on every rank, where the models, the settings and the layout do not fit each other.

    """
    student = _bare(student_chunks, "student")
    distill_cfg.check_topology(_topology_of(student))
    teacher_model = _bare(init_model_from_model_like(teacher) if isinstance(teacher, tuple) else teacher, "teacher")
    _check_models(student, teacher_model, distill_cfg)
    criterion = build_criterion(distill_cfg, student.config, vocab_size=compared_vocabulary(teacher_model))
    balancer = distill_cfg.loss_balancer or LossBalancer(kd_loss_scale=distill_cfg.kd_loss_scale, skip_lm_loss=distill_cfg.skip_lm_loss)
    settings = {"teacher_model": teacher_model, "criterion": criterion, "loss_balancer": balancer}
    model = mtd.convert(student, mode=[("kd_loss", settings)])
    adjust_distillation_model_for_mcore(model, distill_cfg)
    return [model]


def export_student(chunks: Any) -> list[GPTModel]:
    """The student as an ordinary model, in place: hooks, patches, teacher and losses are gone.

    Raises:
        ConfigError: it is no distillation model.

    """
    model = distillation_model(chunks)
    if model is None:
        raise ConfigError(f"{type(chunks).__name__} holds no distillation model")
    remove_adjustments(model)
    for student_layer, _ in model._layers_to_loss:
        vars(student_layer).pop("_intermediate_output", None)
    return [model.export()]


def _bare(model: Any, role: str) -> GPTModel:
    if isinstance(model, Sequence) and len(model) > 1:
        raise ConfigError(f"the {role} has {len(model)} chunks: distillation does not run on the interleaved pipeline schedule; set vp 1")
    inner = unwrap(model)
    if inner is not (model[0] if isinstance(model, Sequence) else model):
        raise ConfigError(f"the {role} is wrapped in {type(model).__name__}: convert first, wrap in DDP afterwards")
    if distillation_model(inner) is not None:
        raise ConfigError(f"the {role} is a distillation model already")
    return inner


def _topology_of(model: GPTModel) -> Topology:
    config = model.config
    vp = config.virtual_pipeline_model_parallel_size or 1
    return Topology(tp=config.tensor_model_parallel_size, pp=config.pipeline_model_parallel_size, vp=vp)


def _check_models(student: GPTModel, teacher: GPTModel, config: DistillationConfig) -> None:
    for name in _SAME_IN_BOTH:
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ConfigError(f"{name} of the student is {ours}, of the teacher {theirs}; build both on one layout")
    sizes = model_config_of(student), model_config_of(teacher)
    if sizes[0].vocab_size != sizes[1].vocab_size:
        raise ConfigError(
            f"vocabulary of the student has {sizes[0].vocab_size} tokens, of the teacher {sizes[1].vocab_size}; "
            "their logits are compared token by token, so both need one tokenizer; if the teacher's has other padding only, "
            "teacher_provider(..., vocab_size=...) aligns it"
        )
    compared = compared_vocabulary(teacher)
    if config.logit_kl_topk is not None and config.logit_kl_topk > compared:
        raise ConfigError(f"logit_kl_topk {config.logit_kl_topk} > vocabulary {compared}")
    config.check_layers(*sizes)
