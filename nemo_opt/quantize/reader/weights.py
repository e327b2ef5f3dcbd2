"""Stored tensors back into float32 weights, by plain formulas: a second implementation that shares no code with the exports.

Every layout says which tensors it consists of, with dtypes and shapes; what is missing, extra or misshapen is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nemo_opt.errors import CheckpointError
from nemo_opt.models.safetensors_dir import SafetensorsReader
from nemo_opt.quantize.reader.description import LinearForm
from nemo_opt.quantize.reader.rounding import STATIC

__all__ = ["LAYOUTS", "Layout", "linear_tensors", "read_weight"]

_FLOATS = ("F32", "BF16", "F16")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Shape = tuple[int, ...]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a weight of [rows, columns] is stored."""

    tensors: Callable[[int, int, tuple[int, int]], dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]]]
    """(rows, columns, group) -> by suffix the dtypes and the shapes that are allowed."""
    decode: Callable[[Tensors, tuple[int, int]], torch.Tensor]
    """(tensors by suffix, group) -> the weight in float32."""


def linear_tensors(form: LinearForm, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]]:
    """The tensors of a linear by suffix: dtypes and shapes that are allowed; without the optional `pre_quant_scale`."""
    height, width = form.group
    if (width and columns % width) or rows % height:
        raise CheckpointError(f"groups of {height} x {width or columns} do not divide a weight of {rows} x {columns}")
    tensors = LAYOUTS[form.weight].tensors(rows, columns, form.group)
    if form.inputs in STATIC:
        tensors["input_scale"] = (_FLOATS, ((), (1,)))
    return tensors


def read_weight(reader: SafetensorsReader, name: str, form: LinearForm, rows: int, columns: int) -> torch.Tensor:
    """The weight of a quantised linear, float32 [rows, columns]; its tensors must have been checked."""
    suffixes = LAYOUTS[form.weight].tensors(rows, columns, form.group)
    tensors = {suffix: reader.whole(f"{name}.{suffix}") for suffix in suffixes}
    if "weight_shape" in tensors and (shape := tensors["weight_shape"].tolist()) != [rows, columns]:
        raise CheckpointError(f"{name}.weight_shape is {shape}, the model needs {[rows, columns]}")
    for suffix, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{name}.{suffix} holds values that are not finite")
    return LAYOUTS[form.weight].decode(tensors, form.group)


def _spread(scale: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    return scale.float().repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)


def _scalar(tensors: Tensors, name: str) -> torch.Tensor:
    return tensors[name].float().reshape(())


def _nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high four bits."""
    return (packed & 15).long(), (packed >> 4).long()


def _signed(nibble: torch.Tensor) -> torch.Tensor:
    return torch.where(nibble > 7, nibble - 16, nibble)


def _int4_rows(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
    even, odd = (_signed(half).float() for half in _nibbles(tensors["weight"]))
    values = torch.stack([even, odd], dim=1).flatten(0, 1)
    return values * _spread(tensors["weight_scale"], group)


def _w4a8(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
    second = _scalar(tensors, "weight_scale_2")
    first = _int4_rows(tensors, group)
    return (first / second).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * second


def _words(num_bits: int) -> Callable[[Tensors, tuple[int, int]], torch.Tensor]:
    def decode(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
        words = tensors["weight_packed"].long() & 0xFFFFFFFF
        parts = [(words >> shift) & ((1 << num_bits) - 1) for shift in range(0, 32, num_bits)]
        columns = int(tensors["weight_shape"][1])
        values = torch.stack(parts, dim=2).flatten(1)[:, :columns] - (1 << (num_bits - 1))
        scale = tensors["weight_scale"].float()
        return values.float() * (_spread(scale, group) if group[1] else scale)

    return decode


def _nvfp4(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    low, high = _nibbles(tensors["weight"])
    values = table[torch.stack([low, high], dim=2).flatten(1)]
    return values * (_spread(tensors["weight_scale"], group) * _scalar(tensors, "weight_scale_2"))


def _mxfp8(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
    return tensors["weight"].float() * _spread(torch.exp2(tensors["weight_scale"].float() - 127), group)


def _block(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:
    scale = tensors["weight_scale"]
    return tensors["weight"].float() * _spread(scale.reshape(scale.shape[0], -1), group)


def _by_row(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:  # noqa: ARG001
    return tensors["weight"].float() * tensors["weight_scale"].float().reshape(-1, 1)


def _whole(tensors: Tensors, group: tuple[int, int]) -> torch.Tensor:  # noqa: ARG001
    return tensors["weight"].float() * _scalar(tensors, "weight_scale")


def _packed(num_bits: int) -> Callable[..., dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]]]:
    def tensors(rows: int, columns: int, group: tuple[int, int]) -> dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]]:
        scales = columns // group[1] if group[1] else 1
        return {
            "weight_packed": (("I32",), ((rows, -(-columns * num_bits // 32)),)),
            "weight_scale": (_FLOATS, ((rows, scales),)),
            "weight_shape": (("I64", "I32"), ((2,),)),
        }

    return tensors


LAYOUTS: dict[str, Layout] = {
    "fp8": Layout(
        tensors=lambda r, c, _: {"weight": (("F8_E4M3",), ((r, c),)), "weight_scale": (_FLOATS, ((), (1,)))},
        decode=_whole,
    ),
    "fp8_channel": Layout(
        tensors=lambda r, c, _: {"weight": (("F8_E4M3",), ((r, c),)), "weight_scale": (_FLOATS, ((r,), (r, 1)))},
        decode=_by_row,
    ),
    "fp8_block": Layout(
        tensors=lambda r, c, g: {
            "weight": (("F8_E4M3",), ((r, c),)),
            "weight_scale": (_FLOATS, ((r // g[0], c // g[1]), (r // g[0], 1, c // g[1], 1))),
        },
        decode=_block,
    ),
    "int8": Layout(
        tensors=lambda r, c, _: {"weight": (("I8",), ((r, c),)), "weight_scale": (_FLOATS, ((r,), (r, 1)))},
        decode=_by_row,
    ),
    "int8_words": Layout(tensors=_packed(8), decode=_words(8)),
    "int4_words": Layout(tensors=_packed(4), decode=_words(4)),
    "int4_rows": Layout(
        tensors=lambda r, c, g: {"weight": (("U8",), ((r // 2, c),)), "weight_scale": (_FLOATS, ((r, c // g[1]),))},
        decode=_int4_rows,
    ),
    "w4a8": Layout(
        tensors=lambda r, c, g: {
            "weight": (("U8",), ((r // 2, c),)),
            "weight_scale": (_FLOATS, ((r, c // g[1]),)),
            "weight_scale_2": (_FLOATS, ((), (1,))),
        },
        decode=_w4a8,
    ),
    "nvfp4": Layout(
        tensors=lambda r, c, g: {
            "weight": (("U8",), ((r, c // 2),)),
            "weight_scale": (("F8_E4M3",), ((r, c // g[1]),)),
            "weight_scale_2": (_FLOATS, ((), (1,))),
        },
        decode=_nvfp4,
    ),
    "mxfp8": Layout(
        tensors=lambda r, c, g: {"weight": (("F8_E4M3",), ((r, c),)), "weight_scale": (("U8",), ((r, c // g[1]),))},
        decode=_mxfp8,
    ),
}
"""By the name in `LinearForm.weight`."""
