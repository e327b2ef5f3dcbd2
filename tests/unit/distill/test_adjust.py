"""The contract with Megatron-Core's pipeline schedule, with the layout mocked; test_layouts.py has the real schedules."""

import dataclasses

import nemo_opt._stack

import modelopt.torch.distill as mtd
import pytest
import torch
from megatron.core import parallel_state

from nemo_opt.checkpoint.state import LOSS_MODULES_KEY
from nemo_opt.distill.adjust import (
    adjust_distillation_model_for_mcore,
    distillation_model,
    get_tensor_shapes_adjust_fn_for_distillation,
    teacher_runs,
)
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.criterion import LossBalancer, build_criterion
from nemo_opt.errors import ConfigError

S, B, H, TEACHER_H = 8, 2, 16, 24


class Wrapper(torch.nn.Module):
    """Like DDP and Float16Module."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.fixture
def pretend(monkeypatch):
    """`pretend(pp=2)`: says that the models, built before, are on such a layout."""

    def say(pp, vp=None):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pp)
        monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: vp)

    return say


def adjust_fn(model, **changes):
    return get_tensor_shapes_adjust_fn_for_distillation(model, **({"seq_length": S, "micro_batch_size": B} | changes))


def tokens():
    ids = torch.arange(S).expand(B, S)
    return ids, ids, None


def test_nothing_is_widened_without_stages(make):
    assert adjust_fn(make.distillation()) is None


def test_nothing_is_widened_for_an_ordinary_model(make, pretend):
    model = make.gpt()
    pretend(pp=2, vp=2)
    assert adjust_fn(model) is None
    assert adjust_fn([model, model]) is None


def test_nothing_is_widened_for_forward_only(make, pretend):
    model = make.distillation()
    pretend(pp=2)
    assert adjust_fn(model, forward_only=True) is None
    assert not teacher_runs(model)
    assert adjust_fn(model) is not None
    assert teacher_runs(model)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: [m], Wrapper, lambda m: [Wrapper(Wrapper(m))]])
def test_shapes_hold_both_hidden_states(make, pretend, wrap):
    model = make.distillation()
    pretend(pp=2)
    received, sent = adjust_fn(wrap(model))([(S, B, H)], [(S, B, H)])
    assert received == sent == [(S, B, H + TEACHER_H)]


def test_shapes_hold_what_the_pairs_need_too(make, monkeypatch):
    """Widths differ: the first stage sends both hidden states of a pair that it holds on to the projection."""
    model = make.distillation(settings=DistillationConfig(intermediate_layer_pairs=[("decoder.layers.0", "decoder.layers.0")]))
    relay = model._nemo_opt_relay
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: None)
    relay.stages, relay.pairs = 3, [dataclasses.replace(pair, home=2) for pair in relay.pairs]
    both, extra = H + TEACHER_H, H + TEACHER_H
    for stage, received, sent in ((0, both, both + extra), (1, both + extra, both + extra), (2, both + extra, both)):
        relay.stage = stage
        assert adjust_fn(model)([(S, B, H)], [(S, B, H)]) == ([(S, B, received)], [(S, B, sent)])


def test_something_else_than_a_language_model_is_left_alone(pretend):
    pretend(pp=2)
    assert adjust_fn(torch.nn.Linear(2, 2)) is None
    assert adjust_fn([Wrapper(torch.nn.Linear(2, 2))]) is None
    assert adjust_fn([]) is None


def test_nemos_positional_arguments(make, pretend):
    model = make.distillation()
    pretend(pp=2)
    assert get_tensor_shapes_adjust_fn_for_distillation(model, S, B, S, False)([(S, B, H)], []) == ([(S, B, H + TEACHER_H)], [])


def test_interleaving_is_refused(make, pretend):
    model = make.distillation()
    pretend(pp=2)
    with pytest.raises(ConfigError, match="vp 2"):
        adjust_fn([model, model])
    pretend(pp=2, vp=2)
    with pytest.raises(ConfigError, match="vp 2"):
        adjust_fn(model)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_variable_sequence_lengths_are_refused(make, pretend, role):
    """Megatron-Core then announces the shape (), whose last dim upstream takes."""
    model = make.distillation()
    pretend(pp=2)
    (model if role == "student" else model.teacher_model).config.variable_seq_lengths = True
    with pytest.raises(ConfigError, match=f"the {role} has variable_seq_lengths"):
        adjust_fn(model)


def test_received_tensor_is_split(make, pretend):
    model = make.distillation()
    pretend(pp=2)
    adjust_fn(model)([(S, B, H)], [(S, B, H)])
    received = torch.arange(float(S * B * (H + TEACHER_H))).view(S, B, -1)
    model.set_input_tensor([received])
    assert torch.equal(model.decoder.input_tensor, received[..., :H])
    assert torch.equal(model.teacher_model.decoder.input_tensor, received[..., H:])


def test_first_stage_receives_none(make):
    model = make.distillation()
    model.set_input_tensor([None])
    assert model.decoder.input_tensor is None
    assert model.teacher_model.decoder.input_tensor is None


def test_evaluation_gets_the_whole_tensor(make, pretend):
    model = make.distillation()
    pretend(pp=2)
    adjust_fn(model)([(S, B, H)], [(S, B, H)])
    received = torch.ones(S, B, H)
    with torch.no_grad():
        model.set_input_tensor([received])
    assert model.decoder.input_tensor is received
    model.eval()
    model.set_input_tensor([2 * received])
    assert torch.equal(model.decoder.input_tensor, 2 * received)


def test_sent_tensor_holds_both(make, monkeypatch):
    model = make.distillation()
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda: False)
    joined = model(*tokens())
    student, teacher = joined.split(joined.shape[-1] // 2, dim=-1)
    assert student.requires_grad
    with torch.no_grad():
        assert torch.equal(teacher, model.teacher_model(*tokens()))
        assert torch.equal(student, model(*tokens()))


def test_teacher_has_no_gradient_and_is_in_evaluation_mode(make):
    model = make.distillation()
    model.train()
    model(*tokens(), labels=tokens()[0])
    assert not model.teacher_model.training
    assert not any(parameter.requires_grad for parameter in model.teacher_model.parameters())


def test_lm_loss_is_skipped_in_training_only(make):
    model = make.distillation()
    labels = tokens()[0]
    assert not model(*tokens(), labels=labels).any()
    with torch.no_grad():
        forward_only = model(*tokens(), labels=labels)
    assert torch.equal(forward_only, make.gpt()(*tokens(), labels=labels))
    model.eval()
    assert torch.equal(forward_only, model(*tokens(), labels=labels))


def test_state_is_that_of_the_student(make):
    model, student = make.distillation(), make.gpt()
    assert [name for name in model.state_dict() if "_extra_state" not in name] == [
        name for name in student.state_dict() if "_extra_state" not in name
    ]
    sharded = model.sharded_state_dict()
    assert sharded.keys() == student.sharded_state_dict().keys()
    resumable = model.sharded_state_dict(metadata={LOSS_MODULES_KEY: True})
    assert {name.split(".")[0] for name in resumable.keys() - sharded.keys()} == {"_loss_modules"}


def test_a_students_state_loads(make):
    model, other = make.distillation(), make.gpt(seed=9)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.output_layer.weight, other.output_layer.weight)


def nemo_conversion(make, settings=None, add=None):
    """The first half of NeMo's sequence: convert through ModelOpt, then adjust. `add`: a loss of hidden states of the caller's own."""
    student, teacher, settings = make.gpt(), make.gpt(make.teacher, 2), settings or make.settings
    criterion = build_criterion(settings, student.config)
    if add is not None:
        criterion["decoder.final_layernorm", "decoder.final_layernorm"] = add
    mode = {"teacher_model": (lambda: teacher, (), {}), "criterion": criterion, "loss_balancer": LossBalancer()}
    return mtd.convert(student, mode=[("kd_loss", mode)])


def test_nemos_sequence_of_calls(make):
    model = nemo_conversion(make)
    assert hasattr(model, "_modelopt_state")
    assert adjust_distillation_model_for_mcore([Wrapper(model)], make.settings) is None
    assert not [name for name in vars(model) if name.startswith("_modelopt_state")]
    assert not model(*tokens(), labels=tokens()[0]).any()


def test_an_own_criterion_is_neither_changed_nor_added_to(make):
    own = DistillationConfig(
        criterion={("output_layer", "output_layer"): torch.nn.MSELoss()}, intermediate_layer_pairs=make.settings.intermediate_layer_pairs
    )
    model = make.distillation(settings=own)
    assert list(model._layers_to_loss.values()) == list(own.criterion.values())
    adjust_distillation_model_for_mcore(both := nemo_conversion(make, add=torch.nn.MSELoss()), own)
    assert len(both._layers_to_loss) == 2


def test_an_earlier_modelopt_mode_stays(make):
    model = nemo_conversion(make)
    quantization = ("quantize", {"config": {}, "metadata": {}})
    model._modelopt_state.insert(0, quantization)
    adjust_distillation_model_for_mcore(model, make.settings)
    assert model._modelopt_state == [quantization]


def test_what_cannot_be_adjusted_is_refused(make):
    with pytest.raises(ConfigError, match="not a distillation model"):
        adjust_distillation_model_for_mcore(make.gpt(), DistillationConfig())
    with pytest.raises(ConfigError, match="adjusted before"):
        adjust_distillation_model_for_mcore(make.distillation(), DistillationConfig())
    model = nemo_conversion(make)
    with pytest.raises(ConfigError, match="vp 2"):
        adjust_distillation_model_for_mcore([model, model], DistillationConfig())
    with pytest.raises(ConfigError, match="criterion has 2 losses, and intermediate_layer_pairs asks for 1 more"):
        adjust_distillation_model_for_mcore(nemo_conversion(make, add=torch.nn.MSELoss()), make.settings)
    model._modelopt_state.append(("quantize", {}))
    with pytest.raises(ConfigError, match="must be kd_loss"):
        adjust_distillation_model_for_mcore(model, DistillationConfig())


def test_distillation_model_is_found_in_wrappers(make):
    model = make.distillation()
    assert distillation_model([Wrapper(Wrapper(model))]) is model
    assert distillation_model(Wrapper(make.gpt())) is None
