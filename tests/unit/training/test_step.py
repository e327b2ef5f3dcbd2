"""MegatronStep hands Megatron-Core's schedule what NeMo's does."""

from unittest.mock import Mock, sentinel

import pytest
import torch

import nemo_opt.distill
from nemo_opt.errors import DataError
from nemo_opt.training import step as step_module
from nemo_opt.training.step import MegatronStep


@pytest.fixture
def schedule(monkeypatch):
    """Stands in for the schedule and the process groups; PP is 2."""
    run = Mock(return_value=[{"loss": torch.tensor([6.0, 2.0])}, {"loss": torch.tensor([2.0, 2.0])}])
    monkeypatch.setattr(step_module, "get_forward_backward_func", lambda: run)
    monkeypatch.setattr(step_module.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(step_module.parallel_state, "get_data_parallel_group", lambda **_: None)
    monkeypatch.setattr(step_module.dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(step_module, "_broadcast_from_last_stage", lambda names, totals: (names, totals))
    return run


@pytest.fixture
def adjust(monkeypatch):
    function = Mock(return_value=sentinel.adjust)
    monkeypatch.setattr(nemo_opt.distill, "get_tensor_shapes_adjust_fn_for_distillation", function)
    return function


def _step(model, data, **changes):
    arguments = {"seq_length": 16, "micro_batch_size": 2, "num_microbatches": 2, "decoder_seq_length": 8, "forward_only": True}
    return MegatronStep(model=model, data_iterator=iter(data), **(arguments | changes))


def test_property_asks_distillation_with_the_arguments_of_the_step(adjust):
    step = _step(sentinel.model, [])
    assert step.adjust_tensor_shapes_fn is sentinel.adjust
    adjust.assert_called_once_with([sentinel.model], 16, 2, 8, True)


def test_pipelines_get_the_function_by_themselves(schedule, adjust):
    metrics = _step(sentinel.model, ["a", "b"])()
    assert metrics == {"loss": 2.0}
    arguments = schedule.call_args.kwargs
    assert arguments["adjust_tensor_shapes_fn"] is sentinel.adjust
    assert {k: arguments[k] for k in ("num_microbatches", "seq_length", "micro_batch_size", "decoder_seq_length", "forward_only")} == {
        "num_microbatches": 2, "seq_length": 16, "micro_batch_size": 2, "decoder_seq_length": 8, "forward_only": True,
    }  # fmt: skip
    assert [list(iterator) for iterator in arguments["data_iterator"]] == [["a", "b"]]


def test_other_models_and_single_stages_get_none(schedule, adjust, monkeypatch):
    adjust.return_value = None
    _step(sentinel.model, "ab")()
    assert "adjust_tensor_shapes_fn" not in schedule.call_args.kwargs
    adjust.return_value = sentinel.adjust
    monkeypatch.setattr(step_module.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    _step(sentinel.model, "ab")()
    assert "adjust_tensor_shapes_fn" not in schedule.call_args.kwargs


def test_gradients_are_on_in_training_and_off_in_validation(schedule, adjust):
    modes = []
    schedule.side_effect = lambda **_: modes.append(torch.is_grad_enabled()) or []
    _step(sentinel.model, "ab", forward_only=False)()
    _step(sentinel.model, "ab", forward_only=True)()
    assert modes == [True, False]


def test_the_step_remembers_whether_its_own_losses_were_numbers(schedule, adjust):
    step = _step(sentinel.model, "abcd")
    step()
    assert step.local_loss_is_finite
    schedule.return_value = [{"loss": torch.tensor([float("inf"), 2.0])}]
    step()
    assert not step.local_loss_is_finite


def test_the_end_of_the_data_is_an_error(schedule, adjust):
    with pytest.raises(DataError, match="the data ended after 1 of 2 micro-batches"):
        _step(sentinel.model, "a")()
    schedule.assert_not_called()
