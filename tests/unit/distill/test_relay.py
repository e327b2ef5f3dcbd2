"""The relay without ranks: stages are objects in a row that hand each other one tensor. test_layouts.py has real pipelines."""

import nemo_opt._stack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.hidden import CarriedLoss, HiddenStateLoss, projection_between
from nemo_opt.distill.pairs import place_pairs
from nemo_opt.distill.relay import Mailbox, Relay, attach_relay

S, B, LAYERS = 3, 2, 4
WIDTHS = {"student": 6, "teacher": 6}


def sizes(hidden, stages, layers=LAYERS):
    return TransformerConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=2, pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32
    )


def relays_of(pairs, stages, *, widths=WIDTHS, dtype=torch.float32):
    """One relay for each stage, and the losses of the last one."""
    student, teacher = sizes(widths["student"], stages), sizes(widths["teacher"], stages)
    placed = place_pairs(pairs, student, teacher)
    projection = projection_between(student, teacher)
    losses = [HiddenStateLoss(pair.kind, student, projection) for pair in placed]
    made = [Relay(pairs=placed, losses=losses, widths=widths, dtype=dtype, stage=stage, stages=stages) for stage in range(stages)]
    made[-1].mailboxes = [(Mailbox(), Mailbox()) for _ in placed]
    at_last = [loss if pair.home == stages - 1 else CarriedLoss(student) for pair, loss in zip(placed, losses, strict=True)]
    return made, losses, at_last


def hidden_states(widths, dtype, seed):
    """Of each layer of each model; the student's need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: [torch.randn(S, B, widths[role], generator=generator).to(dtype).requires_grad_(role == "student") for _ in range(LAYERS)]
        for role in ("student", "teacher")
    }


def run_pipeline(pairs, stages, states, *, widths=WIDTHS, dtype=torch.float32):
    """Losses [B, S] of each pair as they come out of the last stage; checks the messages on the way."""
    relays, _, at_last = relays_of(pairs, stages, widths=widths, dtype=dtype)
    joined = torch.zeros(S, B, sum(widths.values()), dtype=dtype)
    message = None
    per_stage = LAYERS // stages
    for relay in relays:
        own = relay.receive(message)
        if relay.stage:
            assert message.shape[-1] == joined.shape[-1] + relay.received_width == joined.shape[-1] + relays[relay.stage - 1].sent_width
            assert torch.equal(own, joined), "the models' own channels were touched"
        else:
            assert own is None
            assert relay.received_width == 0
        relay.is_active = True
        for index, pair in enumerate(relay.pairs):
            for role in ("student", "teacher"):
                if pair.place(role).stage == relay.stage:
                    number = int(pair.place(role).name.split(".")[2]) + relay.stage * per_stage
                    relay.record(index, role, states[role][number])
        message = relay.finish(joined)
        relay.is_active = False
        assert not relay._hidden
        assert not relay._known
    assert relays[-1].sent_width == 0
    assert message is joined
    boxes = [[box._intermediate_output for box in both] for both in relays[-1].mailboxes]
    return [loss(*outputs)[0] for loss, outputs in zip(at_last, boxes, strict=True)]


def directly(pairs, stages, states, widths=WIDTHS):
    _, losses, _ = relays_of(pairs, stages, widths=widths)
    return [loss(states["student"][int(s[-1])], states["teacher"][int(t[-1])])[0] for loss, (s, t, *_) in zip(losses, pairs, strict=True)]


def gradients(losses, states, weights):
    for state in states["student"]:
        state.grad = None
    sum((loss * weight).sum() for loss, weight in zip(losses, weights, strict=True)).backward()
    return [None if state.grad is None else state.grad.clone() for state in states["student"]]


layer = st.integers(0, LAYERS - 1).map(lambda number: f"decoder.layers.{number}")
some_pairs = st.lists(st.tuples(layer, layer, st.sampled_from(["cosine", "mse"])), min_size=1, max_size=4)


@given(some_pairs, st.sampled_from([1, 2, 4]), st.sampled_from([6, 8]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_losses_and_gradients_are_those_without_stages(pairs, stages, teacher_width, seed):
    widths = {"student": 6, "teacher": teacher_width}
    states = hidden_states(widths, torch.float32, seed)
    weights = torch.rand(len(pairs), B, S, generator=torch.Generator().manual_seed(seed))
    expected = directly(pairs, stages, states, widths)
    expected_gradients = gradients(expected, states, weights)
    through = run_pipeline(pairs, stages, states, widths=widths)
    for ours, theirs in zip(through, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # a product of channels within a message is rounded otherwise
    for ours, theirs in zip(gradients(through, states, weights), expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert all(state.grad is None for state in states["teacher"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_messages_keep_sixteen_bits_of_a_loss(dtype):
    """Through three boundaries, each of which encodes it anew; a second channel holds what the first one's rounding left."""
    pairs = [("decoder.layers.0", "decoder.layers.0", "mse")]
    states = hidden_states(WIDTHS, dtype, seed=1)
    [expected] = directly(pairs, 4, states)
    weights = torch.ones(1, B, S)
    expected_gradient = gradients([expected], states, weights)[0]
    [through] = run_pipeline(pairs, 4, states, dtype=dtype)
    assert through.dtype == torch.float32
    assert not torch.equal(through, through.to(dtype).float()), "one channel would do"
    torch.testing.assert_close(through, expected, rtol=2.0**-16, atol=0)
    torch.testing.assert_close(gradients([through], states, weights)[0], expected_gradient, rtol=2.0**-7, atol=1e-6)


def widths_of(pairs, stages, **changes):
    relays, _, _ = relays_of(pairs, stages, **changes)
    return [(relay.received_width, relay.sent_width) for relay in relays]


def test_what_travels():
    """A known loss is one channel, or two in half precision; a side that waits for the other is its hidden state."""
    together, student_first, teacher_first = ("decoder.layers.0", "decoder.layers.0"), ("decoder.layers.0", "decoder.layers.2"), (
        "decoder.layers.3", "decoder.layers.1")  # fmt: skip
    assert widths_of([together], 4) == [(0, 1), (1, 1), (1, 1), (1, 0)]
    assert widths_of([together], 4, dtype=torch.bfloat16) == [(0, 2), (2, 2), (2, 2), (2, 0)]
    assert widths_of([student_first], 4) == [(0, 6), (6, 6), (6, 1), (1, 0)]
    assert widths_of([teacher_first], 4) == [(0, 0), (0, 6), (6, 6), (6, 0)]
    assert widths_of([together, student_first, teacher_first], 2) == [(0, 1 + 6 + 6), (13, 0)]
    assert widths_of([together], 2, widths={"student": 6, "teacher": 8}) == [(0, 6 + 8), (14, 0)]
    assert widths_of([together], 1) == [(0, 0)]
    assert widths_of([], 2) == [(0, 0), (0, 0)]


def test_nothing_is_kept_while_the_student_runs_alone():
    [relay], _, _ = relays_of([("decoder.layers.0", "decoder.layers.0")], 1)
    relay.record(0, "student", torch.zeros(S, B, 6))
    assert not relay._hidden


def test_without_pairs_messages_pass_as_they_are():
    relays, _, _ = relays_of([], 2)
    message = torch.zeros(S, B, 12)
    assert relays[0].finish(message) is message
    assert relays[1].receive(message) is message


def test_a_models_losses_are_joined_on_the_last_stage(make):
    pairs = [("decoder.layers.0", "decoder.layers.1", "mse"), ("decoder.layers.0", "decoder.layers.2")]
    model = make.distillation(settings=DistillationConfig(intermediate_layer_pairs=pairs))
    kinds = [type(loss).__name__ for loss in model._layers_to_loss.values()]
    assert kinds == ["LogitsDivergence", "HiddenStateLoss", "HiddenStateLoss"]
    assert [name for name, _ in model.loss_modules.named_parameters()] == ["0._fit.weight", "0._fit.bias"]
    as_wide = make.distillation(teacher=make.teacher.with_(hidden_size=16), settings=DistillationConfig(intermediate_layer_pairs=pairs))
    assert not list(as_wide.loss_modules.parameters())


def test_an_earlier_stage_has_hooks_and_no_losses(make, monkeypatch):
    model = make.distillation(settings=DistillationConfig())
    hooks = len(model._hook_handles)
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda: False)
    relay = attach_relay(model, [("decoder.final_layernorm", "decoder.final_layernorm")])
    assert not relay.mailboxes
    assert len(model._layers_to_loss) == 1
    assert len(model._hook_handles) == hooks + 2
    assert not list(model.loss_modules.parameters())
