"""How much each quantizer loses: signal-to-quantisation-noise ratios of weights and of activations, the same at every layout.

SQNR = 10 log10(sum x^2 / sum (x - q(x))^2), in decibels; x is what the quantizer rounds, after its `pre_quant_scale`. One more bit of an
integer is 6 dB (Bennett, Spectra of quantized signals, Bell System Technical Journal 27, 1948).

Decisions:
- Both sums are taken over all ranks that know a quantizer by its global name. Ranks that hold copies add the same signal and the same
  noise, so that a ratio is that of one copy, whatever the layout replicates; ranks that hold parts add up to the whole.
- Weights are exact: each is rounded once. Activations are what passes while the meter runs, for instance during an evaluation.
- Squares are summed in float64; the sums of shards then agree with the whole's to the last digits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModule, SequentialQuantizer, TensorQuantizer

from nemo_opt.models.build import unwrap
from nemo_opt.quantize.tensors import global_names

__all__ = ["ActivationMeter", "Rounding", "measure_activations", "quantized_weights", "weight_rounding"]

_WEIGHT = "weight_quantizer"


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What one quantizer does to the values it rounds."""

    sqnr_db: float | None
    """Signal-to-quantisation-noise ratio in decibels; None where nothing is lost, or all values are zero."""
    amax: float | None
    """The largest of its maxima; None in formats without one (MX)."""


@dataclass
class _Sums:
    """Of this rank."""

    signal: float = 0.0
    noise: float = 0.0
    amax: float | None = None


def weight_rounding(chunks: Sequence[torch.nn.Module]) -> dict[str, Rounding]:
    """Of every quantised weight, by the global name of its quantizer; equal on every rank. Collective.

    Args:
        chunks: this rank's chunks of a quantized model.

    """
    own: dict[str, _Sums] = {}
    with torch.no_grad():
        for name, weight, quantizer in quantized_weights(chunks):
            sums = own.setdefault(name, _Sums(amax=_largest_amax(quantizer)))
            _add(sums, weight.detach(), quantizer(weight))
    return _over_ranks(own)


@contextmanager
def measure_activations(chunks: Sequence[torch.nn.Module]) -> "Iterator[ActivationMeter]":
    """Watches every enabled quantizer that is no weight's (inputs, keys, values) while forward passes run inside; this rank only."""
    meter = ActivationMeter()
    handles = [
        quantizer.register_forward_hook(meter._hook(name))
        for name, quantizer in _quantizers(chunks)
        if not name.split(".")[-1].startswith(_WEIGHT)
    ]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


class ActivationMeter:
    """Sums over the values that passed on this rank."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def results(self) -> dict[str, Rounding]:
        """Of every quantizer that rounded anything on any rank, by global name; equal on every rank. Collective."""
        return _over_ranks(self._sums)

    def _hook(self, name: str) -> Any:
        def add(quantizer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if inputs[0].numel():
                sums = self._sums.setdefault(name, _Sums(amax=_largest_amax(quantizer)))
                _add(sums, _scaled(quantizer, inputs[0].detach()), output.detach())

        return add


def quantized_weights(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Yields (global name of the quantizer, this rank's part of the weight, quantizer) for every weight that is quantised.

    Names are those of a checkpoint's amax, `decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight_quantizer`, for both layer specs.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        rename = global_names(model)
        for name, module in model.named_modules():
            if not isinstance(module, QuantModule):
                continue
            is_grouped = isinstance(getattr(module, _WEIGHT, None), GroupedQuantizer)
            for index, (weight, quantizer) in enumerate(module.iter_weights_for_calibration()):
                if quantizer.is_enabled:
                    yield rename(f"{name}.{_WEIGHT}" + (f".{index}" if is_grouped else "")), weight, quantizer


def _quantizers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """(global name, quantizer) of the enabled ones; of those in sequence, the sequence."""
    for chunk in chunks:
        model = unwrap(chunk)
        rename = global_names(model)
        sequences: list[str] = []
        for name, module in model.named_modules():
            is_inner = any(name.startswith(sequence) for sequence in sequences)
            if isinstance(module, SequentialQuantizer):
                sequences.append(f"{name}.")
            if isinstance(module, SequentialQuantizer | TensorQuantizer) and module.is_enabled and not is_inner:
                yield rename(name), module


def _add(sums: _Sums, values: torch.Tensor, rounded: torch.Tensor) -> None:
    sums.signal += _square(values)
    sums.noise += _square(values.float() - rounded.float())


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _scaled(quantizer: Any, values: torch.Tensor) -> torch.Tensor:
    scale = getattr(quantizer, "pre_quant_scale", None)
    return values if scale is None else values * scale


def _largest_amax(quantizer: Any) -> float | None:
    parts = quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    amax = getattr(parts[0], "amax", None)
    return None if amax is None else float(amax.max())


def _over_ranks(own: Mapping[str, _Sums]) -> dict[str, Rounding]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: (sums.signal, sums.noise, sums.amax) for name, sums in own.items()})
    names = sorted({name for rank in everyone for name in rank})
    return {name: _rounding([rank[name] for rank in everyone if name in rank]) for name in names}


def _rounding(parts: list[tuple[float, float, float | None]]) -> Rounding:
    signal, noise = sum(part[0] for part in parts), sum(part[1] for part in parts)
    maxima = [amax for *_, amax in parts if amax is not None]
    db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return Rounding(sqnr_db=db, amax=max(maxima, default=None))
