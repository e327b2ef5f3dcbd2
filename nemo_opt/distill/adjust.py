"""What Megatron-Core needs to run student and teacher as one model: ModelOpt's adjustments, and what they lack.

A stage of a pipeline sends the student's and the teacher's hidden states in one tensor, joined along the hidden dim. ModelOpt patches the
model for that. Added here:
- Pairs of hidden states on any stage (`relay`); ModelOpt compares those of the last stage only.
- NeMo's `forward_only`: an evaluation runs the student alone. ModelOpt always runs the teacher, and always widens the shapes.
- Checkpoints hold the student alone: teacher, losses and the ModelOpt state of the distillation are hidden or removed, so they load as an
  ordinary model.
- The language model's loss gets logits of its own in float32, since computing it overwrites them before the distillation loss reads them.
- What cannot work (interleaved schedule, variable sequence lengths) is refused by name; ModelOpt returns None or fails on an index.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import nemo_opt._stack

import modelopt.torch.distill as mtd
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from modelopt.torch.distill.plugins import megatron as plugin
from modelopt.torch.opt.conversion import ModeloptStateManager

from nemo_opt.checkpoint.state import LOSS_MODULES_KEY
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.relay import Relay, attach_relay
from nemo_opt.errors import ConfigError

__all__ = ["adjust_distillation_model_for_mcore", "distillation_model", "get_tensor_shapes_adjust_fn_for_distillation",
           "remove_adjustments", "teacher_runs"]  # fmt: skip

Shapes = list[tuple[int, ...]]

_FORWARD_ONLY = "_nemo_opt_forward_only"
_RELAY = "_nemo_opt_relay"
_PATCHED = ("forward", "set_input_tensor", "set_student_input_tensor_shape", "compute_language_model_loss", "sharded_state_dict",
            "state_dict")  # fmt: skip
_BOOKKEEPING = (_FORWARD_ONLY, _RELAY, "_tensor_split_idx", "_lm_loss_call_count")


def adjust_distillation_model_for_mcore(model: Any, distill_cfg: DistillationConfig) -> None:
    """Patches a ModelOpt distillation model, in place, for Megatron-Core's schedules and checkpoints.

    Args:
        model: what `mtd.convert` returned, or a wrapper or list of one.
        distill_cfg: `skip_lm_loss` is read, and `intermediate_layer_pairs` unless it brings its own `criterion`: their losses are added to
            the model's criterion, which holds that of the logits.

    Raises:
        ConfigError: it is no distillation model, has several chunks, was adjusted before, or has losses of hidden states already.

    """
    _refuse_interleaving(model)
    inner = distillation_model(model)
    if inner is None:
        raise ConfigError(f"{type(model).__name__} is not a distillation model: convert it by modelopt.torch.distill.convert first")
    if "forward" in vars(inner):
        raise ConfigError("the distillation model was adjusted before: adjust it once, right after its conversion")
    pairs = distill_cfg.intermediate_layer_pairs if distill_cfg.criterion is None else ()
    if pairs and len(inner._layers_to_loss) > 1:
        raise ConfigError(
            f"the model's criterion has {len(inner._layers_to_loss)} losses, and intermediate_layer_pairs asks for {len(pairs)} more: "
            "give mtd.convert the criterion that build_criterion returns, or give that criterion to DistillationConfig too"
        )
    relay = attach_relay(inner, pairs)
    plugin.adjust_distillation_model_for_mcore(inner, distill_cfg)
    setattr(inner, _RELAY, relay)
    _add_student_only_mode(inner, distill_cfg, relay)
    _hide_all_but_the_student(inner)
    _remove_modelopt_state(inner)


def get_tensor_shapes_adjust_fn_for_distillation(
    model: Any,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]] | None:
    """What Megatron-Core's pipeline schedule calls to widen the shapes it exchanges; None where there is nothing to widen.

    Nothing is widened without pipeline stages, for an ordinary model, and with `forward_only`, where the student runs alone.

    Args:
        model: this rank's chunk, wrapped or not, or the list of chunks.
        seq_length: S of the whole sequence.
        micro_batch_size: B.
        decoder_seq_length: for encoder-decoder models.
        forward_only: whether the schedule runs without backward; the model remembers it until the next call.

    Raises:
        ConfigError: a distillation model on the interleaved schedule, or with variable sequence lengths.

    """
    inner = distillation_model(model)
    if inner is None or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return None
    setattr(inner, _FORWARD_ONLY, forward_only)
    if forward_only:
        return None
    _refuse_interleaving(model)
    for role, part in (("student", inner), ("teacher", inner.teacher_model)):
        if get_model_config(part).variable_seq_lengths:
            raise ConfigError(f"the {role} has variable_seq_lengths, which distillation over pipeline stages cannot split; set it false")
    adjust = plugin.get_tensor_shapes_adjust_fn_for_distillation(
        inner, seq_length=seq_length, micro_batch_size=micro_batch_size, decoder_seq_length=decoder_seq_length
    )
    relay: Relay = getattr(inner, _RELAY)

    def widened(received: Shapes, sent: Shapes) -> tuple[Shapes, Shapes]:
        received, sent = adjust(received, sent)
        return _wider(received, relay.received_width), _wider(sent, relay.sent_width)

    return widened


def _wider(shapes: Shapes, channels: int) -> Shapes:
    return [(*shape[:-1], shape[-1] + channels) for shape in shapes]


def distillation_model(model: Any) -> Any | None:
    """The ModelOpt distillation model inside wrappers and lists; None where there is none."""
    for chunk in model if isinstance(model, Sequence) else [model]:
        while not isinstance(chunk, mtd.DistillationModel) and hasattr(chunk, "module"):
            chunk = chunk.module
        if isinstance(chunk, mtd.DistillationModel):
            return chunk
    return None


def teacher_runs(model: Any) -> bool:
    """Whether a forward pass now would run the teacher: only a training pass does."""
    return bool(model.training and torch.is_grad_enabled() and not getattr(model, _FORWARD_ONLY, False))


def remove_adjustments(model: Any) -> None:
    """Undoes the patches on the object; ModelOpt's own conversion is left."""
    for name in (*_PATCHED, *_BOOKKEEPING):
        vars(model).pop(name, None)


def _refuse_interleaving(model: Any) -> None:
    chunks = len(model) if isinstance(model, Sequence) else 1
    vp = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    if max(chunks, vp) > 1:
        raise ConfigError(f"vp {max(chunks, vp)}: distillation does not run on the interleaved pipeline schedule; set vp 1")


def _add_student_only_mode(model: Any, distill_cfg: DistillationConfig, relay: Relay) -> None:
    together_forward, together_input, together_lm_loss = model.forward, model.set_input_tensor, model.compute_language_model_loss
    # Megatron-Core's cross-entropy overwrites float32 logits, which the distillation loss still has to read.
    keeps_logits = model.config.params_dtype == torch.float32 and not distill_cfg.skip_lm_loss

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if teacher_runs(self):
            relay.is_active = True
            try:
                return relay.finish(together_forward(*args, **kwargs))
            finally:
                relay.is_active = False
        with self.only_student_forward():
            output = type(self).forward(self, *args, **kwargs)
        _forget_activations(self)
        return output

    def set_input_tensor(self: Any, input_tensor: Any) -> None:
        if teacher_runs(self):
            messages = input_tensor if isinstance(input_tensor, list) else [input_tensor]
            together_input([relay.receive(message) for message in messages])
        else:
            type(self).set_input_tensor(self, input_tensor)

    def compute_language_model_loss(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if teacher_runs(self):
            return together_lm_loss(labels, logits.clone() if keeps_logits else logits)
        return type(self).compute_language_model_loss(self, labels, logits)

    for function in (forward, set_input_tensor, compute_language_model_loss):
        setattr(model, function.__name__, MethodType(function, model))


def _forget_activations(model: Any) -> None:
    """Hooks keep the student's outputs for a loss that is not computed now."""
    for student_layer, _ in model._layers_to_loss:
        student_layer._intermediate_output = None


def _hide_all_but_the_student(model: Any) -> None:
    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        hide_losses = not (metadata or {}).get(LOSS_MODULES_KEY, False)
        with self.hide_teacher_model(), self.hide_loss_modules(enable=hide_losses):
            return type(self).sharded_state_dict(self, prefix, sharded_offsets, metadata, **kwargs)

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.hide_loss_modules():
            return type(self).state_dict(self, *args, **kwargs)

    for function in (sharded_state_dict, state_dict):
        setattr(model, function.__name__, MethodType(function, model))


def _remove_modelopt_state(model: Any) -> None:
    """Drops the distillation from what ModelOpt would save, and keeps for instance a quantization that came before it."""
    states = ModeloptStateManager(model).state_dict()
    if not states or states[-1][0] != "kd_loss":
        raise ConfigError(f"the last ModelOpt mode of a distillation model must be kd_loss, found {[name for name, _ in states]}")
    states.pop()
    if not states:
        for name in (ModeloptStateManager._state_key, ModeloptStateManager._state_version_key):
            delattr(model, name)
