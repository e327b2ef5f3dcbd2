import nemo_opt._stack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from modelopt.torch.distill.plugins.megatron import HiddenStateCosineLoss, MSELoss

from nemo_opt.distill.hidden import CarriedLoss, HiddenStateLoss, projection_between
from nemo_opt.errors import ConfigError


def sizes(hidden=8, **changes):
    return TransformerConfig(num_layers=2, hidden_size=hidden, num_attention_heads=2, **changes)


def states(seed, *shape, dtype=torch.float32):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_and_gradient(loss, student, teacher, weights):
    student = student.clone().requires_grad_()
    losses, *marks = loss(student, teacher)
    (losses * weights).sum().backward()
    return losses.detach(), student.grad, marks


@pytest.mark.parametrize(("kind", "theirs"), [("cosine", HiddenStateCosineLoss), ("mse", MSELoss)])
@given(
    seq=st.integers(1, 5),
    batch=st.integers(1, 3),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
)
@settings(max_examples=30, deadline=None)
def test_equals_modelopts_in_float32_and_the_formula_in_float64(kind, theirs, seq, batch, hidden, seed, scale):
    student, teacher = states(seed, seq, batch, hidden) * scale
    weights = torch.rand(batch, seq, generator=torch.Generator().manual_seed(seed))
    ours = loss_and_gradient(HiddenStateLoss(kind, sizes(), None), student, teacher, weights)
    upstream = loss_and_gradient(theirs(sizes()), student, teacher, weights)
    if scale >= 1:  # ModelOpt adds 1e-12 to squared lengths, which shows in short states
        torch.testing.assert_close(ours[0], upstream[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], upstream[1], rtol=1e-4, atol=1e-5 / scale)
    assert ours[2] == upstream[2] == [False, False]
    s, t = student.double(), teacher.double()
    exact = ((s - t) ** 2).mean(-1) if kind == "mse" else 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    torch.testing.assert_close(ours[0].double(), exact.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_half_precision_is_compared_in_float32(kind):
    """ModelOpt's cosine of nearly equal states in bfloat16 is wrong in the second digit, and may be negative."""
    teacher = states(3, 16, 2, 64)[0]
    student = (teacher + 0.05 * states(4, 16, 2, 64)[0]).bfloat16()
    teacher = teacher.bfloat16()
    exact = HiddenStateLoss(kind, sizes(), None).per_token(student.float(), teacher.float())
    ours = HiddenStateLoss(kind, sizes(), None).per_token(student, teacher)
    assert torch.equal(ours, exact)
    assert ours.dtype == torch.float32
    if kind == "cosine":
        theirs = HiddenStateCosineLoss(sizes())(student, teacher)[0].T
        assert ((theirs.float() - exact).abs() / exact).median() > 0.2


def test_equal_states_are_at_no_distance_and_only_the_student_learns():
    student, _ = states(0, 4, 2, 8)
    for kind in ("cosine", "mse"):
        teacher = student.clone().requires_grad_()
        own = student.clone().requires_grad_()
        losses = HiddenStateLoss(kind, sizes(), None).per_token(own, teacher)
        assert losses.abs().max() < 1e-6
        losses.sum().backward()
        assert own.grad.abs().max() < 1e-6
        assert teacher.grad is None


def test_outputs_with_a_bias_are_accepted():
    """Megatron-Core's linears and blocks return (output, bias)."""
    student, teacher = states(0, 4, 2, 8)
    loss = HiddenStateLoss("mse", sizes(), None)
    assert torch.equal(loss((student, None), (teacher, None))[0], loss(student, teacher)[0])


def test_sequence_parallelism_is_marked():
    parallel = sizes(tensor_model_parallel_size=2, sequence_parallel=True)
    student, teacher = states(0, 4, 2, 8)
    assert HiddenStateLoss("cosine", parallel, None)(student, teacher)[1:] == (False, True)
    assert CarriedLoss(parallel)(student[..., 0])[1:] == (False, True)


def test_a_carried_loss_is_only_turned_round():
    losses = torch.arange(6.0).view(3, 2)
    carried, tp_reduce, split = CarriedLoss(sizes())(losses, None)
    assert torch.equal(carried, losses.T)
    assert (tp_reduce, split) == (False, False)


@pytest.mark.parametrize("shape", [(5, 2, 8), (4, 1, 8), (4, 2, 6)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(
        ConfigError, match=rf"student are \[4, 2, 8\], of the teacher \[{', '.join(map(str, shape))}\].*same sequence length"
    ):
        HiddenStateLoss("mse", sizes(), None)(torch.zeros(4, 2, 8), torch.zeros(shape))


def test_projection_maps_the_students_width_to_the_teachers():
    projection = projection_between(sizes(), sizes(hidden=12))
    student, teacher = torch.randn(4, 2, 8), torch.randn(4, 2, 12)
    losses = HiddenStateLoss("mse", sizes(), projection).per_token(student, teacher)
    torch.testing.assert_close(losses, ((projection(student) - teacher) ** 2).mean(-1))
    losses.sum().backward()
    assert all(parameter.grad.any() for parameter in projection.parameters())
    assert projection_between(sizes(), sizes()) is None


def test_projection_does_not_depend_on_the_random_state():
    """Tensor- and data-parallel ranks each make one; they must be copies."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append([parameter.clone() for parameter in projection_between(sizes(), sizes(hidden=12)).parameters()])
    assert [tuple(parameter.shape) for parameter in made[0]] == [(12, 8), (12,)]
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))
    assert 0.01 < made[0][0].std() < 0.04  # init_method_std is 0.02
    assert not made[0][1].any()


@pytest.mark.parametrize("parallel", [True, False])
def test_projections_gradients_are_added_up_under_sequence_parallelism(parallel):
    student = sizes(tensor_model_parallel_size=2, sequence_parallel=parallel)
    assert {parameter.sequence_parallel for parameter in projection_between(student, sizes(hidden=12)).parameters()} == {parallel}


def test_projection_has_the_students_type():
    projection = projection_between(sizes(params_dtype=torch.bfloat16), sizes(hidden=12))
    assert {parameter.dtype for parameter in projection.parameters()} == {torch.bfloat16}
