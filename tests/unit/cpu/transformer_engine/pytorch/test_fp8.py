"""FP8 is off, says so, and cannot be switched on."""

import pytest

from nemo_opt.cpu.transformer_engine.common import recipe
from nemo_opt.cpu.transformer_engine.pytorch import fp8
from nemo_opt.cpu.transformer_engine.pytorch.tensor import QuantizedTensor
from nemo_opt.errors import ConfigError

MANAGER = fp8.FP8GlobalStateManager


def test_every_question_is_answered_with_no():
    for name in ("is_fp8_enabled", "is_fp8_calibration", "with_fp8_parameters", "fp8_graph_capturing", "is_first_fp8_module"):
        assert getattr(MANAGER, name)() is False
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        available, reason = getattr(MANAGER, name)()
        assert not available
        assert "GPU" in reason
    assert MANAGER.get_fp8_recipe() is None
    assert MANAGER.get_fp8_group() is None
    assert MANAGER.get_autocast_state() == MANAGER.get_fp8_autocast_state() == (False, False)
    assert fp8.is_fp8_available() is False
    assert fp8.is_fp8_available(return_reason=True) == fp8.check_fp8_support()


@pytest.mark.parametrize(
    "switch_on",
    [
        lambda: fp8.fp8_autocast().__enter__(),
        lambda: fp8.fp8_autocast(enabled=False, calibrating=True).__enter__(),
        lambda: fp8.fp8_model_init().__enter__(),
        lambda: MANAGER.set_fp8_autocast_state((True, False)),
    ],
)
def test_switching_it_on_is_refused(switch_on):
    with pytest.raises(ConfigError, match="no FP8 kernels"):
        switch_on()


def test_contexts_that_are_off_do_nothing():
    with fp8.fp8_autocast(enabled=False), fp8.fp8_model_init(enabled=False):
        assert not MANAGER.is_fp8_enabled()
    MANAGER.set_fp8_autocast_state((False, False))
    MANAGER.reset()
    MANAGER.reduce_and_update_fp8_tensors()
    MANAGER.copy_forward_fp8_meta_tensors_for_recompute({})
    MANAGER.set_skip_fp8_weight_update_tensor(True)


def test_quantized_tensors_cannot_be_made():
    with pytest.raises(NotImplementedError):
        QuantizedTensor([1.0])


def test_recipes_know_what_they_are():
    kinds = {
        "delayed": recipe.DelayedScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
        "nvfp4": recipe.NVFP4BlockScaling,
        "float8_current_scaling": recipe.Float8CurrentScaling,
        "float8_block_scaling": recipe.Float8BlockScaling,
    }
    for kind in kinds.values():
        assert [getattr(kind(), question)() for question in kinds] == [kind is other for other in kinds.values()]
