"""Hidden-state losses on any pipeline stage: what one stage hands to the next beside the hidden states of student and teacher.

A pair's loss is computed where both hidden states are at hand, which need not be the last stage, and weighed with all others on the last
one. Between stages a message therefore has further channels behind student and teacher: for each pair whose loss is known, the loss of
each token; for each pair of which one side is known, that side's hidden state. Gradients come back the same way, in the message's
gradient, so that losses and gradients are those of one rank. A pair of equal widths on one stage costs one channel (two in half precision,
which keep 16 bits of the loss).

ModelOpt, Megatron-LM and NeMo compare layers of the last stage only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import nemo_opt._stack

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opt.distill.hidden import CarriedLoss, HiddenStateLoss, projection_between
from nemo_opt.distill.pairs import ROLES, PlacedPair, Role, place_pairs
from nemo_opt.models.norms import on_norm_output

__all__ = ["Relay", "attach_relay"]


class Mailbox(torch.nn.Module):
    """Stands for a layer where ModelOpt looks for its output: what arrived here, from this stage or an earlier one."""

    _intermediate_output: torch.Tensor | None = None


@dataclass
class Relay:
    """The pairs as one pipeline stage sees them, and what it holds of the micro-batch at hand."""

    pairs: Sequence[PlacedPair]
    """All pairs, the same on every stage."""
    losses: Sequence[HiddenStateLoss]
    """Of each pair."""
    widths: dict[Role, int]
    """Hidden sizes."""
    dtype: torch.dtype
    """Of messages."""
    stage: int
    """This one, from 0."""
    stages: int
    """How many there are."""
    mailboxes: Sequence[tuple[Mailbox, Mailbox]] = ()
    """Of each pair, on the last stage."""
    is_active: bool = False
    """Whether hidden states are wanted: not where the student runs alone."""
    _hidden: dict[tuple[int, Role], torch.Tensor] = field(default_factory=dict)
    _known: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def received_width(self) -> int:
        """Channels that messages from the stage before have, beside those of student and teacher."""
        return sum(width for *_, width in self._slots(self.stage - 1))

    @property
    def sent_width(self) -> int:
        """The same of messages to the next stage."""
        return sum(width for *_, width in self._slots(self.stage))

    def receive(self, message: torch.Tensor | None) -> torch.Tensor | None:
        """Takes from a message [S, B, channels] what belongs to the pairs; returns the rest."""
        if message is None or not self.received_width:
            return message
        end = start = message.size(-1) - self.received_width
        for index, role, width in self._slots(self.stage - 1):
            channels = message[..., end : end + width]
            if role is None:
                self._known[index] = _decoded(channels)
            else:
                self._hidden[index, role] = channels if role == "student" else channels.detach()
            end += width
        return message[..., :start]

    def record(self, index: int, role: Role, output: Any) -> None:
        """Keeps the output of a layer of this stage."""
        if self.is_active:
            self._hidden[index, role] = output[0] if isinstance(output, tuple) else output

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """After the forward pass: computes the losses that are this stage's, and joins to the output what later stages need.

        On the last stage the mailboxes are filled instead, and the output returned as it is.
        """
        if self.stage == self.stages - 1:
            self._deliver()
        else:
            for index, pair in enumerate(self.pairs):
                if pair.home == self.stage:
                    self._known[index] = self.losses[index].per_token(*self._both(index))
            channels = [self._channels(index, role) for index, role, _ in self._slots(self.stage)]
            output = torch.cat([output, *channels], dim=-1) if channels else output
        self.forget()
        return output

    def forget(self) -> None:
        """Drops what is held of a micro-batch."""
        self._hidden.clear()
        self._known.clear()

    def _slots(self, sender: int) -> Iterator[tuple[int, Role | None, int]]:
        """(pair, role or None for its loss, channels) of what stage `sender` sends on, in the order of the message."""
        if not 0 <= sender < self.stages - 1:
            return
        for index, pair in enumerate(self.pairs):
            if pair.home <= sender:
                yield index, None, _loss_channels(self.dtype)
            else:
                yield from ((index, role, self.widths[role]) for role in ROLES if pair.place(role).stage <= sender)

    def _both(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._hidden[index, "student"], self._hidden[index, "teacher"]

    def _channels(self, index: int, role: Role | None) -> torch.Tensor:
        return _encoded(self._known[index], self.dtype) if role is None else self._hidden[index, role].to(self.dtype)

    def _deliver(self) -> None:
        for index, (student, teacher) in enumerate(self.mailboxes):
            if index in self._known:
                student._intermediate_output = self._known[index]
            else:
                student._intermediate_output, teacher._intermediate_output = self._both(index)


def attach_relay(model: Any, pairs: Any) -> Relay:
    """Prepares a ModelOpt distillation model of this stage for pairs of hidden states; its losses join those of the last stage.

    Args:
        model: the distillation model, unwrapped; hooks go with its export.
        pairs: as in `DistillationConfig.intermediate_layer_pairs`.

    Raises:
        ConfigError: a pair cannot teach; on every rank.

    """
    student: TransformerConfig = model.config
    teacher: TransformerConfig = model.teacher_model.config
    placed = place_pairs(pairs, student, teacher)
    is_last = parallel_state.is_pipeline_last_stage()
    projection = projection_between(student, teacher) if is_last and placed else None
    relay = Relay(
        pairs=placed,
        losses=[HiddenStateLoss(pair.kind, student, projection) for pair in placed],
        widths={"student": student.hidden_size, "teacher": teacher.hidden_size},
        dtype=student.pipeline_dtype or student.params_dtype,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        stages=student.pipeline_model_parallel_size,
    )
    _hook_layers(model, relay)
    if is_last:
        _join_losses(model, relay, student, projection)
    return relay


def _hook_layers(model: Any, relay: Relay) -> None:
    for index, pair in enumerate(relay.pairs):
        for role in ROLES:
            place = pair.place(role)
            if place.stage == relay.stage:
                part = model if role == "student" else model.teacher_model
                model._hook_handles.add(_on_output(part, place.name, _recorder(relay, index, role)))


def _on_output(model: Any, name: str, callback: Callable[[Any], None]) -> Any:
    module, (parent, _, part) = model.get_submodule(name), name.rpartition(".")
    if part in ("input_layernorm", "pre_mlp_layernorm"):
        layer = model.get_submodule(parent)
        linear = layer.self_attention.linear_qkv if part == "input_layernorm" else getattr(layer.mlp, "linear_fc1", None)
        return on_norm_output(module, linear, callback)
    return module.register_forward_hook(lambda _module, _inputs, output: callback(output))


def _recorder(relay: Relay, index: int, role: Role) -> Callable[[Any], None]:
    return lambda output: relay.record(index, role, output)


def _join_losses(model: Any, relay: Relay, student: TransformerConfig, projection: torch.nn.Module | None) -> None:
    """Gives ModelOpt a mailbox and a loss for each pair, and the projection's parameters one name, whatever the layout."""
    relay.mailboxes = [(Mailbox(), Mailbox()) for _ in relay.pairs]
    for pair, mailboxes, loss in zip(relay.pairs, relay.mailboxes, relay.losses, strict=True):
        model._layers_to_loss[mailboxes] = loss if pair.home == relay.stage else CarriedLoss(student)
    if projection is not None:
        model._loss_modules.append(projection)


def _loss_channels(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def _encoded(losses: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[S, B] as channels of a message; in half precision a second one holds what the first one's rounding left."""
    first = losses.to(dtype)
    if _loss_channels(dtype) == 1:
        return first[..., None]
    return torch.stack([first, (losses.detach() - first.detach()).to(dtype)], dim=-1)


def _decoded(channels: torch.Tensor) -> torch.Tensor:
    return channels.float().sum(dim=-1)
