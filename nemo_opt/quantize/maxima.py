"""Calibration by maxima without what ModelOpt's does twice, in one place: its collector is exchanged while a calibration loop runs.

Upstream (0.47) collects the maxima of every weight again on every micro-batch, though it has just done so and weights do not change in a
loop; it goes over each activation twice, for the largest and the least; and it asks three times after each whether all is well, where each
question waits for the device. Together that was 12 to 20 % of a forward pass (`benchmarks/test_calibration.py`). Here an activation is read
once, and what is not finite is found at the end of the loop, by name, on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nemo_opt._stack

import torch
from modelopt.torch.quantization.calib.max import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.collective import on_each
from nemo_opt.errors import DataError

__all__ = ["quick_maxima"]

_NARROW = 1  # bytes an element: float8 has no kernels for maxima, ModelOpt widens it
_collect = MaxCalibrator.collect


@contextmanager
def quick_maxima(model: torch.nn.Module) -> Iterator[None]:
    """Within it calibrators collect maxima as described above; collective.

    Raises:
        DataError: On every rank, where an activation was NaN or infinite on any; it names the quantizer.

    """
    quantizers = {name: module for name, module in model.named_modules() if _collects_maxima(module)}
    known = [q for name, q in quantizers.items() if "weight_quantizer" in name and q._calibrator.compute_amax() is not None]
    for quantizer in known:
        quantizer.disable_calib()
    MaxCalibrator.collect = _collect_in_one_pass
    try:
        yield
    finally:
        MaxCalibrator.collect = _collect
        for quantizer in known:
            quantizer.enable_calib()
    on_each(lambda: _require_finite(quantizers))


def _collects_maxima(module: torch.nn.Module) -> bool:
    return isinstance(module, TensorQuantizer) and module._if_calib and isinstance(module._calibrator, MaxCalibrator)


@torch.no_grad()
def _collect_in_one_pass(calibrator: Any, x: torch.Tensor) -> None:
    if calibrator._axis is not None or calibrator._track_amax or x.is_meta or not x.is_floating_point() or x.element_size() == _NARROW:
        _collect(calibrator, x)
        return
    least, largest = torch.aminmax(x)
    amax, before = torch.maximum(least.abs(), largest.abs()), calibrator._calib_amax
    calibrator._calib_amax = amax if before is None else torch.maximum(before, amax)


def _require_finite(quantizers: dict[str, TensorQuantizer]) -> None:
    maxima = {name: q._calibrator.compute_amax() for name, q in quantizers.items()}
    bad = [name for name, amax in maxima.items() if amax is not None and not bool(torch.isfinite(amax).all())]
    if bad:
        raise DataError(f"calibration saw NaN or infinity at {len(bad)} quantizers, first {bad[0]}: look for it in weights and data")
