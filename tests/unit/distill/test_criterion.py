import nemo_opt._stack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt.torch.distill.plugins.megatron import HiddenStateCosineLoss, LogitsKLLoss, MSELoss, TopKLogitsKLLoss

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.criterion import LogitsDivergence, LossBalancer, build_criterion, local_layer_name
from nemo_opt.errors import ConfigError

LOGITS = ("output_layer", "output_layer")
FINAL_NORMS = ("decoder.final_layernorm", "decoder.final_layernorm")


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
    out["kd_loss"].backward()
    assert (float(logits.grad), float(lm.grad)) == pytest.approx((6 / 3 * 0.5, 1))


def test_skipped_lm_loss_leaves_no_trace():
    assert balance(scalar(3), lm=scalar(5), skip_lm_loss=True)["kd_loss"].item() == 3


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


def test_criterion_of_a_settings_object():
    config = DistillationConfig(intermediate_layer_pairs=[FINAL_NORMS, ("decoder.layers.3", "decoder.layers.5", "mse")])
    criterion = build_criterion(config, sizes(), sizes(hidden=12, layers=6))
    assert {names: type(loss) for names, loss in criterion.items()} == {
        LOGITS: LogitsDivergence, FINAL_NORMS: HiddenStateCosineLoss, ("decoder.layers.3", "decoder.layers.5"): MSELoss
    }  # fmt: skip


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
    losses, reduced, split = build_criterion(settings, sizes(), sizes())[LOGITS](student, teacher)
    (losses.sum() / (4 if squared else 1)).backward()
    expected.sum().backward()
    torch.testing.assert_close(losses, expected * (4 if squared else 1))
    torch.testing.assert_close(student.grad, other.grad)
    assert (losses.shape, reduced, split) == ((3, 5), False, False)


def test_padding_of_the_vocabulary_is_not_compared(world):
    loss = build_criterion(DistillationConfig(), sizes(), sizes(), vocab_size=15)[LOGITS]
    student, teacher = torch.randn(2, 5, 3, 20, generator=torch.Generator().manual_seed(1))
    expected = build_criterion(DistillationConfig(), sizes(), sizes())[LOGITS](student[..., :15], teacher[..., :15].clone())[0]
    torch.testing.assert_close(loss(student, teacher)[0], expected)


def test_own_criterion_is_taken_as_it_is():
    own = {LOGITS: torch.nn.MSELoss()}
    assert build_criterion(DistillationConfig(criterion=own), sizes(), sizes()) == own


def test_projection_does_not_depend_on_the_random_state():
    """Tensor- and data-parallel ranks each make one; they must be copies."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        criterion = build_criterion(DistillationConfig(intermediate_layer_pairs=[FINAL_NORMS]), sizes(), sizes(hidden=12))
        made.append([parameter.clone() for parameter in criterion[FINAL_NORMS].parameters()])
    assert [tuple(parameter.shape) for parameter in made[0]] == [(12, 8), (12,)]
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))
    assert made[0][0].std() > 0.01


def test_equal_widths_need_no_projection():
    criterion = build_criterion(DistillationConfig(intermediate_layer_pairs=[FINAL_NORMS]), sizes(), sizes())
    assert not list(criterion[FINAL_NORMS].parameters())


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("decoder.final_layernorm", "decoder.final_layernorm"),
        ("decoder.layers.2", "decoder.layers.0"),
        ("decoder.layers.3.mlp", "decoder.layers.1.mlp"),
    ],
)
def test_layer_numbers_on_the_last_stage(name, local):
    assert local_layer_name(name, sizes(pipeline_model_parallel_size=2)) == local


def test_layers_of_earlier_stages_are_refused():
    with pytest.raises(ConfigError, match="begins with layer 2"):
        local_layer_name("decoder.layers.1.mlp", sizes(pipeline_model_parallel_size=2))
