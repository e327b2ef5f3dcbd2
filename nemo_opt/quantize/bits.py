"""What a quantised model takes: bits per weight, scales included, from the quantizers' settings and the shapes; on any layout.

What is counted is the quantised form that exports write and engines read, not a sharded checkpoint, which keeps weights as they were:
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
import torch.distributed as dist
from modelopt.torch.quantization.nn import SequentialQuantizer

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
    scale_bits: int
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
    total = {name: _bits(weights[name], _elements(scales, name, "._amax"), formats[name]) for name in formats}
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
    levels = list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]
    first = min(levels, key=lambda level: element_bits(level.num_bits))
    sizes = {dim: size for dim, size in (first.block_sizes or {}).items() if isinstance(dim, int) and size}
    is_dynamic = bool(sizes) and first.block_sizes.get("type") == "dynamic"
    is_integer_block = bool(sizes) and isinstance(first.num_bits, int)
    return _Format(
        element_bits=element_bits(first.num_bits),
        dynamic_block=math.prod(sizes.values()) if is_dynamic else None,
        scale_bits=_INTEGER_BLOCK_SCALE_BITS if is_integer_block else _SCALE_BITS,
        block="x".join(str(sizes[dim]) for dim in sorted(sizes)),
    )


def _bits(weights: int, scales: int, form: _Format) -> int:
    dynamic = 0 if form.dynamic_block is None else weights // form.dynamic_block * _DYNAMIC_SCALE_BITS
    return weights * form.element_bits + scales * form.scale_bits + dynamic


def _elements(sizes: Mapping[str, int], name: str, suffix: str = "") -> int:
    """Elements under `name`: those of a gated MLP's two halves, and of quantizers in sequence, are added up."""
    names = [f"{name}{part}{suffix}{half}" for part in ("", ".0", ".1") for half in ("", GATE_SUFFIX, UP_SUFFIX)]
    return sum(sizes.get(one, 0) for one in names)


def _merged[T](own: dict[str, T]) -> dict[str, T]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: value for rank in everyone for name, value in rank.items()}
