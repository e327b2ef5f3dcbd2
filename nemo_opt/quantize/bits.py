"""What a quantised model takes: bits per weight, scales included, from the quantizers' settings and the shapes; on any layout.

What is counted is the quantised form that engines hold, not a sharded checkpoint, which keeps weights as they were, nor the few bytes by
which the files of an export differ (their scales of integer blocks are float32, which engines round to the weights' 16 bits):
- a weight has its format's bits: of an integer, or sign, exponent and mantissa; of two formats in sequence (int4, then FP8) the narrower;
- block scales made from the data (NVFP4, MXFP8) have 8 bits, those of integer blocks 16 (bfloat16), all others 32 (float32);
- what is not quantised (embedding, head, norms) has 16 bits.
A `pre_quant_scale` is not counted: 16 bits for each input channel, most of which exports fold away.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nemo_opt._stack

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer

from nemo_opt.collective import on_each
from nemo_opt.models.shards import GATE_SUFFIX, UP_SUFFIX, parameter_shards, quantizer_shards
from nemo_opt.quantize.sqnr import quantized_weights

__all__ = ["BitsPerWeight", "bits_per_weight", "element_bits"]

_UNQUANTIZED_BITS = 16
_DYNAMIC_SCALE_BITS, _INTEGER_BLOCK_SCALE_BITS, _SCALE_BITS = 8, 16, 32


@dataclass(frozen=True, kw_only=True)
class BitsPerWeight:
    """Bits of a model in its exported form."""

    quantized: float | None
    """Of a quantised weight on average, scales included; None where none is quantised."""
    model: float
    """Of any parameter on average."""
    by_name: dict[str, float]
    """Of each quantised weight, by the global name of its quantizer."""
    block: str
    """Weights that share a scale, such as 128 or 128x128; empty without blocks."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    element_bits: int
    dynamic_block: int | None
    """Values that share a scale made from the data."""
    scale_bits: dict[str, int]
    """Of a scale from calibration, for each quantizer in sequence by its suffix ("" alone, ".0" and ".1")."""
    block: str


def bits_per_weight(chunks: Sequence[torch.nn.Module]) -> BitsPerWeight:
    """Of a model, quantised or not; equal on every rank. Collective.

    Args:
        chunks: this rank's chunks.

    """
    formats = _merged({name: _format(quantizer) for name, _, quantizer in quantized_weights(chunks)})
    sizes = _merged({shard.key: math.prod(shard.global_shape) for shard in parameter_shards(chunks)})
    scales = _merged({shard.key: math.prod(shard.global_shape) for shard in quantizer_shards(chunks) if "._amax" in shard.key})
    weights = {name: _elements(sizes, name.removesuffix("_quantizer")) for name in formats}
    total = {name: _bits(name, weights[name], scales, formats[name]) for name in formats}
    quantized, parameters = sum(weights.values()), sum(sizes.values())
    return BitsPerWeight(
        quantized=sum(total.values()) / quantized if quantized else None,
        model=(sum(total.values()) + _UNQUANTIZED_BITS * (parameters - quantized)) / parameters,
        by_name={name: total[name] / weights[name] for name in sorted(total)},
        block=", ".join(sorted({form.block for form in formats.values() if form.block})),
    )


def element_bits(num_bits: int | tuple[int, int]) -> int:
    """Bits of one value: of an integer, or of a float of (exponent, mantissa) bits with its sign."""
    return num_bits if isinstance(num_bits, int) else 1 + sum(num_bits)


def _format(quantizer: Any) -> _Format:
    levels = {f".{n}": level for n, level in enumerate(quantizer)} if isinstance(quantizer, SequentialQuantizer) else {"": quantizer}
    narrowest = min(levels.values(), key=lambda level: element_bits(level.num_bits))
    sizes = _block_sizes(narrowest)
    is_dynamic = bool(sizes) and narrowest.block_sizes.get("type") == "dynamic"
    return _Format(
        element_bits=element_bits(narrowest.num_bits),
        dynamic_block=math.prod(sizes.values()) if is_dynamic else None,
        scale_bits={suffix: _scale_bits(level) for suffix, level in levels.items()},
        block="x".join(str(sizes[dim]) for dim in sorted(sizes)),
    )


def _block_sizes(level: Any) -> dict[int, int]:
    return {dim: size for dim, size in (level.block_sizes or {}).items() if isinstance(dim, int) and size}


def _scale_bits(level: Any) -> int:
    return _INTEGER_BLOCK_SCALE_BITS if _block_sizes(level) and isinstance(level.num_bits, int) else _SCALE_BITS


def _bits(name: str, weights: int, scales: Mapping[str, int], form: _Format) -> int:
    """Of a weight whose quantizer is `name`; `scales` are the elements of every amax."""
    dynamic = 0 if form.dynamic_block is None else weights // form.dynamic_block * _DYNAMIC_SCALE_BITS
    calibrated = sum(_elements(scales, f"{name}{suffix}._amax") * bits for suffix, bits in form.scale_bits.items())
    return weights * form.element_bits + calibrated + dynamic


def _elements(sizes: Mapping[str, int], key: str) -> int:
    """Elements under `key`; those of a gated MLP's two halves are added up."""
    return sum(sizes.get(f"{key}{half}", 0) for half in ("", GATE_SUFFIX, UP_SUFFIX))


def _merged[T](own: dict[str, T]) -> dict[str, T]:
    return {name: value for rank in on_each(lambda: own) for name, value in rank.items()}
