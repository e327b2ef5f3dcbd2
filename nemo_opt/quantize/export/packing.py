"""Codes and scales as the tensors of a file: names, shapes and packing of the two forms of export.

compressed-tensors packs integers in int32, from the low bits up, each with half its range added; ModelOpt packs two rows of INT4 in a byte,
and two columns of E2M1 (the first in the low bits in either case).
"""

import torch

from nemo_opt.quantize.export.codes import Codes
from nemo_opt.quantize.export.description import COMPRESSED_TENSORS
from nemo_opt.quantize.export.formats import Kind, LinearFormat

__all__ = ["pack_fp4", "pack_int4_rows", "pack_int32", "stored_tensors"]


def stored_tensors(
    name: str, codes: Codes, form: LinearFormat, method: str, *, input_scale: torch.Tensor | None, pre_quant_scale: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of one linear, by name.

    Args:
        name: Of the linear in Hugging Face's model, such as `model.layers.3.mlp.down_proj`.
        codes: Its rows.
        form: Its format.
        method: Form of the export.
        input_scale: []; None where inputs are not quantised, or have no scale of their own (MXFP8).
        pre_quant_scale: [columns]; None where there is none, or another tensor took it.

    """
    tensors = _compressed_tensors(codes, form) if method == COMPRESSED_TENSORS else _modelopt(codes, form)
    if input_scale is not None:
        tensors["input_scale"] = input_scale.reshape((1,) if method == COMPRESSED_TENSORS else ())
    if pre_quant_scale is not None:
        tensors["pre_quant_scale"] = pre_quant_scale
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def pack_int32(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[rows, columns] int8 as [rows, ceil(columns * num_bits / 32)] int32; 32 must be a multiple of num_bits."""
    per_word = 32 // num_bits
    shifted = values.long() + (1 << (num_bits - 1))
    shifted = torch.nn.functional.pad(shifted, (0, -shifted.shape[1] % per_word))
    places = num_bits * torch.arange(per_word)
    words = (shifted.unflatten(1, (-1, per_word)) << places).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_int4_rows(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of -8..7 as [rows / 2, columns] uint8: an even row below the odd one after it."""
    nibbles = (values & 0x0F).to(torch.uint8)
    return nibbles[0::2] | (nibbles[1::2] << 4)


def pack_fp4(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 0..15 as [rows, columns / 2] uint8: an even column below the odd one after it."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _compressed_tensors(codes: Codes, form: LinearFormat) -> dict[str, torch.Tensor]:
    scale = codes.scale.reshape(1) if form.kind is Kind.FP8 else codes.scale
    if form.kind is Kind.INT4 or (form.kind is Kind.INT8 and not form.quantizes_inputs):
        packed = pack_int32(codes.values, 4 if form.kind is Kind.INT4 else 8)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(codes.values.shape)}
    return {"weight": codes.values, "weight_scale": scale}


def _modelopt(codes: Codes, form: LinearFormat) -> dict[str, torch.Tensor]:
    values = codes.values
    if form.kind is Kind.NVFP4:
        values = pack_fp4(values)
    elif form.kind in (Kind.INT4, Kind.W4A8):
        values = pack_int4_rows(values)
    tensors = {"weight": values, "weight_scale": codes.scale}
    return tensors if codes.scale_2 is None else tensors | {"weight_scale_2": codes.scale_2.clone()}  # every linear has its own
