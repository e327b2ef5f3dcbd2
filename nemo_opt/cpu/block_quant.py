"""Fake quantization to block-scaled formats (NVFP4, MX) and FP8 on CPU tensors: what ModelOpt leaves to Triton and CUDA.

Decisions:

* Written from the definitions: a value is divided by its block's scale (one float32 division), rounded to the nearest element, halves to
  even, saturated, and multiplied with the scale (one float32 product). ModelOpt's packers (`NVFP4QTensor`, `MXFP8QTensor`) do the same,
  so that a checkpoint holds what was simulated.
* A tensor is worked through in pieces that stay in the processor's cache, with two buffers for all of them.
* A block in which anything is infinite or NaN comes out as NaN throughout: MX 1.0 gives such a block the scale NaN, and a fault surfaces
  here. ModelOpt's kernels turn some of these values into finite ones.
* Blocks run along the last dimension; a last block that is not full counts as filled up with zeros, as in ModelOpt.

Sources: OCP Microscaling Formats (MX) 1.0, 2023; NVFP4 as in "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, appendix
on quantization: E2M1 elements in blocks of 16, one E4M3 scale for each block, one float32 scale amax / (6 * 448) for the tensor. FP8 in
blocks of 128x128: "DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3.2.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nemo_opt.cpu.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, ElementFormat, e8m0_scale, not_finite, round_, saturate_

__all__ = ["cast_e2m1", "dynamic_block_quantize", "fp8", "mx", "nvfp4", "nvfp4_static"]

_PIECE = 1 << 17  # elements worked on at once: two buffers of 512 KiB; from 2^16 to 2^18 the speed is the same
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_Quantize = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
_ELEMENTS = {(2, 1): E2M1, (2, 3): E2M3, (3, 2): E3M2, (4, 3): E4M3, (5, 2): E5M2}


def dynamic_block_quantize(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """ModelOpt's operator `tensorrt::dynamic_block_quantize_op`, for CPU tensors.

    Args:
        inputs: float32, bfloat16 or float16, any shape; blocks of `block_size` run along the last dimension.
        block_size: Elements that share a scale.
        amax: Calibrated largest magnitude of the tensor (the largest of several), for E4M3 scales; None: that of `inputs`.
        num_bits: Of an element, with its sign.
        exponent_bits: Of an element; 0 for integers.
        scale_num_bits: Of a scale, with its sign.
        scale_exponent_bits: Of a scale: 4 of 8 is E4M3 (NVFP4), 8 of 9 is E8M0 (MX).

    Returns:
        The quantized values, of the inputs' shape and type, contiguous.

    Raises:
        NotImplementedError: A format that no published definition and no configuration of ModelOpt uses.
        TypeError: Inputs of another type, as in ModelOpt's kernels.
    """
    element = _ELEMENTS.get((exponent_bits, num_bits - exponent_bits - 1)) if exponent_bits else {8: INT8}.get(num_bits)
    scale = (scale_exponent_bits, scale_num_bits - scale_exponent_bits - 1)
    if element is None or scale not in {(8, 0), (4, 3)}:
        wanted = f"elements of {num_bits} bits, {exponent_bits} of them exponent, with scales E{scale[0]}M{scale[1]}"
        known = ", ".join([*(known.name for known in _ELEMENTS.values()), INT8.name])
        raise NotImplementedError(f"dynamic block quantization to {wanted}; the CPU backend has {known} with scales E8M0 or E4M3")
    if scale == (8, 0):
        return mx(inputs, element, block_size)
    return nvfp4(inputs, amax, block_size, element)


def mx(inputs: torch.Tensor, element: ElementFormat, block_size: int = 32) -> torch.Tensor:
    """Fake quantization to an MX format: elements that share a power of two (OCP MX 1.0; see `formats.e8m0_scale` for its choice).

    Args:
        inputs: float32, bfloat16 or float16, any shape.
        element: Their format; E4M3 is MXFP8, E2M1 is MXFP4, INT8 is MXINT8.
        block_size: Elements that share a scale; 32 by the standard.

    Returns:
        The quantized values, of the inputs' shape and type. A magnitude within half a step of the type's largest may round past it.
    """

    def quantize(values: torch.Tensor, scratch: torch.Tensor, rows: slice) -> torch.Tensor:
        inverse, scale = e8m0_scale(_block_maxima(values, scratch), element)
        round_(values.mul_(inverse), element, scratch)  # the scale was rounded up: nothing saturates, and both products are exact
        return scale

    return _by_blocks(inputs, block_size, quantize)


def nvfp4(inputs: torch.Tensor, amax: torch.Tensor | None = None, block_size: int = 16, element: ElementFormat = E2M1) -> torch.Tensor:
    """Fake quantization to NVFP4: elements that share an E4M3 scale, which is relative to one float32 scale for the tensor.

    Args:
        inputs: float32, bfloat16 or float16, any shape.
        amax: Largest magnitude of the tensor as calibrated; of several the largest counts; blocks beyond saturate. None: that of `inputs`.
        block_size: Elements that share an E4M3 scale; 16 by definition.
        element: Their format; E2M1 by definition.

    Returns:
        The quantized values, of the inputs' shape and type. A block whose scale is below half of E4M3's smallest, 2^-10, is zero, as
        is everything under an amax of 0.
    """
    amax = inputs.detach().abs() if amax is None else amax
    amax = amax.amax().float() if amax.numel() else inputs.new_zeros((), dtype=torch.float32)
    tensor_scale = amax / (element.maximum * E4M3.maximum)
    unit = (element.maximum * tensor_scale).masked_fill(tensor_scale == 0, math.inf)

    def quantize(values: torch.Tensor, scratch: torch.Tensor, rows: slice) -> torch.Tensor:
        maxima = _block_maxima(values, scratch)
        scale = round_(saturate_(maxima / unit, E4M3), E4M3).mul_(tensor_scale)
        return _round_scaled(values, scale.masked_fill_(not_finite(maxima), math.nan), element, scratch)

    return _by_blocks(inputs, block_size, quantize)


def nvfp4_static(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    scale_maximum: float = E4M3.maximum,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Fake quantization to NVFP4 with a calibrated largest magnitude for each block, as ModelOpt's weight searches choose it.

    Args:
        inputs: float32, bfloat16 or float16, any shape; of `amax.numel()` blocks, one after the other.
        amax: One magnitude for each block; elements beyond it saturate.
        global_amax: That of the tensor; None: the largest of `amax`.
        quantize_block_scales: Whether the blocks' scales are E4M3; else float32.
        scale_maximum: The E4M3 scale of a block whose amax is `global_amax`: 448, or 256 where blocks may use only 4 of E2M1's 6 ("4/6").
        out_dtype: Of the result; None: that of the inputs.

    Returns:
        The quantized values, of the inputs' shape.

    Raises:
        ValueError: The inputs do not divide into that many blocks.
    """
    blocks = amax.numel()
    if not blocks or inputs.numel() % blocks:
        raise ValueError(f"{inputs.numel()} values do not divide into the {blocks} blocks that have an amax")
    amax = amax.reshape(blocks, 1).float()
    scales = amax / E2M1.maximum
    if quantize_block_scales:  # in the order of ModelOpt's exporter, so that it writes the same scales
        global_amax = amax.amax() if global_amax is None else global_amax.amax().float()
        largest = (global_amax / E2M1.maximum).masked_fill(global_amax == 0, math.inf)
        codes = round_(saturate_(scales * scale_maximum / largest, E4M3), E4M3)
        scales = codes * (global_amax / (E2M1.maximum * scale_maximum))
    flat = inputs.reshape(blocks, inputs.numel() // blocks)

    def quantize(values: torch.Tensor, scratch: torch.Tensor, rows: slice) -> torch.Tensor:
        return _round_scaled(values, scales[rows], E2M1, scratch)

    return _by_blocks(flat, flat.shape[1], quantize, out_dtype).view(inputs.shape)


def cast_e2m1(inputs: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The nearest E2M1 elements (halves to even, saturated) of inputs of any shape, without a scale.

    Args:
        inputs: float32, bfloat16 or float16.
        out_dtype: Of the result; None: that of the inputs.
    """

    def quantize(values: torch.Tensor, scratch: torch.Tensor, rows: slice) -> torch.Tensor:
        round_(saturate_(values, E2M1), E2M1, scratch)
        return values.new_ones(())

    return _by_blocks(inputs.reshape(-1), _PIECE, quantize, out_dtype).view(inputs.shape)


def fp8(inputs: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
    """ModelOpt's `_fp8_eager`, several times faster and with equal results: fake quantization to E4M3 with float32 scales amax / 448.

    The order of its operations is kept, as in ModelOpt's CUDA kernel: the value times (448 / amax), and the element times the inverse of
    that. The definition (the value divided by amax / 448, the element times that) differs from it where a value lies within float32's
    precision of the middle between two elements, and in the last digits of the results.

    Args:
        inputs: A floating-point type, any shape.
        amax: Largest magnitudes, of a shape that broadcasts to the inputs'; values beyond saturate; up to 2^-24 they count as 1,
            so that dead channels become zero. None: no scale, and what E4M3 does not hold becomes NaN.

    Returns:
        The quantized values, of the inputs' shape and type.
    """
    if amax is None:
        return inputs.to(torch.float8_e4m3fn).to(inputs.dtype)
    if not inputs.numel():
        return torch.empty_like(inputs)
    source, amax = inputs.detach(), amax.detach().float()
    if amax.numel() == 1:
        source, amax = source.reshape(-1), amax.reshape(1)
    amax = amax.reshape((1,) * (source.dim() - amax.dim()) + amax.shape)
    factor = E4M3.maximum / torch.where(amax <= 2.0**-24, 1.0, amax)
    scale, inverse = (factors.expand(len(source), *factors.shape[1:]) for factors in (factor, 1 / factor))

    def quantize(values: torch.Tensor, scratch: torch.Tensor, rows: slice) -> torch.Tensor:
        round_(saturate_(values.mul_(scale[rows]), E4M3), E4M3, scratch)
        return inverse[rows]

    return _by_pieces(source, quantize, inputs.dtype).view(inputs.shape)


def _by_blocks(inputs: torch.Tensor, block_size: int, quantize: _Quantize, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Applies `quantize(values, scratch, rows) -> scale` to pieces of [blocks, block_size].

    It leaves the elements in `values` (float32) and may use `scratch` (int32); what is returned times the elements is the result.
    """
    if inputs.dtype not in _TYPES:
        raise TypeError(f"block quantization takes float32, bfloat16 or float16, not {str(inputs.dtype).removeprefix('torch.')}")
    if not inputs.numel():
        return torch.empty_like(inputs, dtype=out_dtype)
    shaped = inputs.detach().reshape(inputs.shape or (1,))
    missing = -shaped.shape[-1] % block_size
    padded = F.pad(shaped, (0, missing)) if missing else shaped
    result = _by_pieces(padded.reshape(-1, block_size), quantize, out_dtype or inputs.dtype)
    return result.view(padded.shape)[..., : shaped.shape[-1]].contiguous().view(inputs.shape)


def _by_pieces(source: torch.Tensor, quantize: _Quantize, out_dtype: torch.dtype) -> torch.Tensor:
    """Applies `quantize` to pieces of the first dimension."""
    target = torch.empty(source.shape, dtype=out_dtype, device=source.device)
    step = min(max(1, _PIECE * len(source) // source.numel()), len(source))
    values = torch.empty(step, *source.shape[1:], dtype=torch.float32, device=source.device)
    scratch = torch.empty_like(values, dtype=torch.int32)
    for start in range(0, len(source), step):
        rows = slice(start, min(start + step, len(source)))
        piece = values[: rows.stop - start].copy_(source[rows])
        scale = quantize(piece, scratch[: rows.stop - start], rows)
        torch.mul(piece, scale, out=target[rows])
    return target


def _block_maxima(values: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The largest magnitudes of the rows, [rows, 1]: compared as integers, which is faster and puts NaN above infinity."""
    return torch.bitwise_and(values.view(torch.int32), 0x7FFFFFFF, out=scratch).amax(-1, keepdim=True).view(torch.float32)


def _round_scaled(values: torch.Tensor, scale: torch.Tensor, element: ElementFormat, scratch: torch.Tensor) -> torch.Tensor:
    """Replaces values by the elements nearest to values / scale, and returns the scale; a scale of 0 gives zeros."""
    values.div_(scale.masked_fill(scale == 0, math.inf))
    round_(saturate_(values, element), element, scratch)
    return scale
