"""Distillation: a frozen teacher beside the student in one Megatron-Core model, through ModelOpt, on every layout but virtual stages."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.distill.adjust import adjust_distillation_model_for_mcore, get_tensor_shapes_adjust_fn_for_distillation
    from nemo_opt.distill.config import DistillationConfig, load_distillation_config
    from nemo_opt.distill.convert import convert_to_distillation_model, export_student
    from nemo_opt.distill.criterion import LossBalancer, build_criterion
    from nemo_opt.distill.losses import distillation_loss_fn
    from nemo_opt.distill.provider import teacher_provider

_EXPORTS = {
    "adjust": ["adjust_distillation_model_for_mcore", "get_tensor_shapes_adjust_fn_for_distillation"],
    "config": ["DistillationConfig", "load_distillation_config"],
    "convert": ["convert_to_distillation_model", "export_student"],
    "criterion": ["LossBalancer", "build_criterion"],
    "losses": ["distillation_loss_fn"],
    "provider": ["teacher_provider"],
}

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs=_EXPORTS)

__all__ = [
    "DistillationConfig",
    "LossBalancer",
    "adjust_distillation_model_for_mcore",
    "build_criterion",
    "convert_to_distillation_model",
    "distillation_loss_fn",
    "export_student",
    "get_tensor_shapes_adjust_fn_for_distillation",
    "load_distillation_config",
    "teacher_provider",
]
