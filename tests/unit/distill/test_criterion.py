import nemo_opt._stack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.criterion import LogitsDivergence, LossBalancer, build_criterion
from nemo_opt.errors import ConfigError

LOGITS = ("output_layer", "output_layer")


def sizes(hidden=8, layers=4, **changes):
    return TransformerConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=2, pipeline_dtype=torch.float32, **changes)


def balance(logits, hidden=(), lm=None, **settings):
    losses = {"LogitsKLLoss_0": logits} | {f"HiddenStateCosineLoss_{i}": loss for i, loss in enumerate(hidden, 1)}
    if lm is not None:
        losses["student_loss"] = lm
    given_losses = dict(losses)
    out = LossBalancer(**settings)(losses)
    assert losses == given_losses, "the caller's dict was changed"
    return out


def scalar(value):
    return torch.tensor(float(value), requires_grad=True)


def test_hidden_states_count_as_much_as_logits():
    logits, one, two = scalar(3), scalar(0.2), scalar(0.4)
    out = balance(logits, [one, two])
    assert {name: loss.item() for name, loss in out.items()} == pytest.approx({"kd_loss": 6, "logits_loss": 3, "intermediate_loss": 0.3})
    out["kd_loss"].backward()
    # d/done of 3 / 0.3 * (one + two) / 2, the ratio being a constant
    assert (float(logits.grad), float(one.grad), float(two.grad)) == pytest.approx((1, 5, 5))


def test_lm_loss_weighs_as_kd_loss_scale_says():
    logits, lm = scalar(3), scalar(6)
    out = balance(logits, lm=lm, skip_lm_loss=False, kd_loss_scale=0.5)
    assert out["kd_loss"].item() == pytest.approx(6 + 6 * 0.5)
    assert out["lm_loss"] is lm
    out["kd_loss"].backward()
    assert (float(logits.grad), float(lm.grad)) == pytest.approx((6 / 3 * 0.5, 1))


def test_skipped_lm_loss_leaves_no_trace():
    out = balance(scalar(3), lm=scalar(5), skip_lm_loss=True)
    assert out["kd_loss"].item() == 3
    assert "lm_loss" not in out


losses = st.floats(-(2.0**-20), 1024, width=32)


@given(losses, st.lists(losses, max_size=3), losses, st.booleans())
def test_never_divides_by_zero_and_never_turns_a_gradient_round(logits, hidden, lm, skip):
    """NeMo's balancer raises ZeroDivisionError when teacher and student are equal; rounding can even make losses negative."""
    parts = [scalar(logits), *map(scalar, hidden), scalar(lm)]
    total = balance(parts[0], parts[1:-1], lm=parts[-1], skip_lm_loss=skip)["kd_loss"]
    assert torch.isfinite(total)
    total.backward()
    for part in parts:
        assert part.grad is None or (torch.isfinite(part.grad) and part.grad >= 0)


def test_criterion_is_that_of_the_logits_on_the_last_stage_and_empty_elsewhere(world, monkeypatch):
    """`adjust_distillation_model_for_mcore` adds the pairs of hidden states."""
    config = DistillationConfig(intermediate_layer_pairs=[("decoder.final_layernorm", "decoder.final_layernorm")])
    criterion = build_criterion(config, sizes())
    assert {names: type(loss) for names, loss in criterion.items()} == {LOGITS: LogitsDivergence}
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda: False)
    assert build_criterion(config, sizes()) == {}


OPTIONS = [  # and ModelOpt's class that computes the same on one rank
    ({}, lambda: LogitsKLLoss(sizes(), temperature=2.0)),
    ({"logit_loss": "reverse_kl"}, lambda: LogitsKLLoss(sizes(), temperature=2.0, reverse=True)),
    ({"logit_kl_topk": 3}, lambda: TopKLogitsKLLoss(sizes(), temperature=2.0, top_k=3)),
    ({"logit_kl_topk": 3, "logit_loss": "reverse_kl"}, lambda: TopKLogitsKLLoss(sizes(), temperature=2.0, top_k=3, reverse=True)),
]


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("options", "theirs"), OPTIONS)
def test_logits_are_compared_as_modelopt_compares_them(world, options, theirs, squared):
    settings = DistillationConfig(logit_kl_temperature=2, logit_kl_scale_by_temperature_squared=squared, **options)
    student, teacher = torch.randn(2, 5, 3, 20, generator=torch.Generator().manual_seed(1))  # [S, B, V]
    other = student.clone().requires_grad_()
    student.requires_grad_()
    expected, _, _ = theirs()(other, teacher.clone())
    losses, reduced, split = build_criterion(settings, sizes())[LOGITS](student, teacher)
    (losses.sum() / (4 if squared else 1)).backward()
    expected.sum().backward()
    torch.testing.assert_close(losses, expected * (4 if squared else 1))
    torch.testing.assert_close(student.grad, other.grad)
    assert (losses.shape, reduced, split) == ((3, 5), False, False)


def test_padding_of_the_vocabulary_is_not_compared(world):
    loss = build_criterion(DistillationConfig(), sizes(), vocab_size=15)[LOGITS]
    student, teacher = torch.randn(2, 5, 3, 20, generator=torch.Generator().manual_seed(1))
    expected = build_criterion(DistillationConfig(), sizes())[LOGITS](student[..., :15], teacher[..., :15].clone())[0]
    torch.testing.assert_close(loss(student, teacher)[0], expected)


def test_own_criterion_is_taken_as_it_is(world):
    own = {LOGITS: torch.nn.MSELoss()}
    assert build_criterion(DistillationConfig(criterion=own), sizes()) == own


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize(("student_is_wrong", "teacher_is_wrong"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_it_remembers_whose_logits_were_no_finite_numbers(world, student_is_wrong, teacher_is_wrong, wrong, topk):
    loss = build_criterion(DistillationConfig(logit_kl_topk=topk), sizes())[LOGITS]
    student, teacher = torch.randn(2, 5, 3, 20, generator=torch.Generator().manual_seed(1))
    loss(student.clone(), teacher.clone())
    assert loss.finite.tolist() == [True, True]
    place = teacher[2, 1].argmax() if topk else 7  # among the candidates
    for logits, is_wrong in ((student, student_is_wrong), (teacher, teacher_is_wrong)):
        if is_wrong:
            logits[2, 1, place] = wrong
    loss(student, teacher)
    assert loss.finite.tolist() == [not student_is_wrong, not teacher_is_wrong]


def test_logits_of_other_lengths_are_refused(world):
    loss = build_criterion(DistillationConfig(), sizes())[LOGITS]
    with pytest.raises(ConfigError, match=r"student are \[5, 3, 20\], of the teacher \[4, 3, 20\].*one vocabulary, sequence length"):
        loss(torch.zeros(5, 3, 20), torch.zeros(4, 3, 20))
