"""The state of FP8 execution, which here is always off.

`fp8_autocast(enabled=True)` and `fp8_model_init(enabled=True)` are refused: these kernels need a GPU, and running in a wider type under an
FP8 name would report results of a training that did not happen. ModelOpt's fake quantization is another thing and works.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nemo_opt.errors import ConfigError

__all__ = ["FP8GlobalStateManager", "check_fp8_support", "fp8_autocast", "fp8_model_init", "is_fp8_available"]

_REASON = "FP8 execution needs a GPU of compute capability 8.9 or higher"


def _refuse(what: str) -> NoReturn:
    raise ConfigError(
        f"{what} was asked for, but this is the CPU reference of Transformer Engine, which has no FP8 kernels and does not pretend to. "
        f"Set fp8=None in the TransformerConfig (ModelOpt's FP8 fake quantization needs no fp8 setting), or run on a GPU."
    )


def check_fp8_support() -> tuple[bool, str]:
    """Whether FP8 can run here, and why not."""
    return False, _REASON


def is_fp8_available(return_reason: bool = False) -> bool | tuple[bool, str]:
    """Whether FP8 can run here (with the reason if asked)."""
    return check_fp8_support() if return_reason else False


class FP8GlobalStateManager:
    """Answers questions about FP8; all answers are that it is off."""

    quantization_updates_required = False
    skip_fp8_weight_update_tensor = None

    @classmethod
    def reset(cls) -> None:
        """There is no state to reset."""

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        """Whether FP8 can run here, and why not."""
        return check_fp8_support()

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        """Whether MXFP8 can run here, and why not."""
        return check_fp8_support()

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        """Whether block-scaled FP8 can run here, and why not."""
        return check_fp8_support()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether FP8 execution is on."""
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Whether FP8 scales are being collected."""
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        """Whether parameters are made in FP8."""
        return False

    @classmethod
    def fp8_graph_capturing(cls) -> bool:
        """Whether a CUDA graph is being captured."""
        return False

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        """Whether the caller is the first FP8 module of a step."""
        return False

    @classmethod
    def get_fp8_recipe(cls) -> None:
        """The recipe in force: none."""

    @classmethod
    def get_fp8_group(cls) -> None:
        """The group that reduces maxima: none."""

    @classmethod
    def get_autocast_state(cls) -> tuple[bool, bool]:
        """(enabled, calibrating)."""
        return False, False

    @classmethod
    def get_fp8_autocast_state(cls) -> tuple[bool, bool]:
        """(enabled, calibrating)."""
        return False, False

    @classmethod
    def set_fp8_autocast_state(cls, fp8_state: tuple[bool, bool]) -> None:
        """Accepts only the state in which FP8 is off.

        Raises:
            ConfigError: FP8 is to be switched on.
        """
        if any(fp8_state[:2]):
            _refuse(f"the FP8 state {fp8_state}")

    @classmethod
    def set_skip_fp8_weight_update_tensor(cls, skip: bool) -> None:
        """There are no FP8 weights to update."""

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        """There are no FP8 scales to update."""

    @classmethod
    def copy_forward_fp8_meta_tensors_for_recompute(cls, fp8_meta: dict[str, Any]) -> None:
        """There are no FP8 scales to keep."""


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Context in which modules would run in FP8; accepted only when that is off.

    Raises:
        ConfigError: `enabled` or `calibrating` is set.
    """
    if enabled or calibrating:
        _refuse(f"fp8_autocast(enabled={enabled}, calibrating={calibrating})")
    yield


@contextmanager
def fp8_model_init(enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False) -> Iterator[None]:
    """Context in which parameters would be made in FP8; accepted only when that is off.

    Raises:
        ConfigError: `enabled` is set.
    """
    if enabled:
        _refuse("fp8_model_init(enabled=True)")
    yield
