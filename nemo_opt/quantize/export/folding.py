"""Where the scales that AWQ and SmoothQuant put before a linear go in an export, which has no place for most of them.

A `pre_quant_scale` multiplies the inputs of a linear. Engines have no such step (TensorRT-LLM's AWQ kernels excepted), so it moves into
what makes these inputs, where that is exact:
- the weight of the norm before the attention and the MLP (one rounding);
- the rows of the up projection for `linear_fc2`, and of the value projection for `linear_proj`, where scaling a row only scales its scales.
  For the latter all query heads of a group must share the scale, since they read one value head, and the cache must not be quantised.

AWQ: Lin et al., https://arxiv.org/abs/2306.00978; SmoothQuant: Xiao et al., https://arxiv.org/abs/2211.10438.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nemo_opt.models.config import ModelConfig
from nemo_opt.quantize.export.formats import LinearFormat

__all__ = ["PRE_QUANT_SCALE", "Folding", "fold"]

PRE_QUANT_SCALE = ".input_quantizer._pre_quant_scale"
"""What follows the name of a linear in `quantizer_tensors`."""

_NORMED = ("self_attention.linear_qkv", "mlp.linear_fc1")


@dataclass(kw_only=True)
class Folding:
    """Where each scale goes."""

    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Key of a norm's weight -> [hidden], which multiplies it."""
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """Key of a linear's weight -> [rows], which multiplies the scales of its rows."""
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name of a linear -> [columns], which could not be moved."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name of a linear -> why."""


def fold(tensors: Mapping[str, torch.Tensor], formats: Mapping[str, LinearFormat], model: ModelConfig, *, quantizes_cache: bool) -> Folding:
    """Decides for each `pre_quant_scale` of a model; if one must be written, so are all that no norm takes, which engines expect together.

    Args:
        tensors: Whole tensors by name (`quantizer_tensors`).
        formats: Of the linears.
        model: Its sizes.
        quantizes_cache: Whether the KV cache is quantised.

    """
    scales = {key.removesuffix(PRE_QUANT_SCALE): tensor for key, tensor in tensors.items() if key.endswith(PRE_QUANT_SCALE)}
    folding, to_rows = Folding(), {}
    for name, scale in scales.items():
        layer, linear = _split(name)
        if linear in _NORMED:
            folding.norms[f"{name}.layer_norm_weight"] = scale.float()
        elif (reason := _reason(layer, linear, scale, formats, model, quantizes_cache)) is None:
            to_rows[name] = scale.float()
        else:
            folding.reasons[name] = reason
    if folding.reasons:
        folding.written = {name: scale.float() for name, scale in scales.items() if _split(name)[1] not in _NORMED}
    else:
        folding.rows = dict(_rows(*_split(name), scale, model) for name, scale in to_rows.items())
    return folding


def _split(name: str) -> tuple[str, str]:
    parts = name.split(".")
    return ".".join(parts[:3]), ".".join(parts[3:])


def _reason(
    layer: str, linear: str, scale: torch.Tensor, formats: Mapping[str, LinearFormat], model: ModelConfig, quantizes_cache: bool
) -> str | None:
    source = f"{layer}.mlp.linear_fc1" if linear == "mlp.linear_fc2" else f"{layer}.self_attention.linear_qkv"
    form = formats.get(source)
    if form is not None and not form.has_row_scales:
        return f"the rows of {source} share a scale ({form.kind})"
    if linear == "mlp.linear_fc2":
        return None
    if quantizes_cache:
        return "the KV cache is quantised"
    groups = scale.view(model.num_query_groups, -1, model.head_dim)
    return None if torch.equal(groups, groups[:, :1].expand_as(groups)) else "query heads of a group have different scales"


def _rows(layer: str, linear: str, scale: torch.Tensor, model: ModelConfig) -> tuple[str, torch.Tensor]:
    if linear == "mlp.linear_fc2":
        return f"{layer}.mlp.linear_fc1.weight_v", scale
    heads = scale.view(model.num_query_groups, -1, model.head_dim)
    ones = torch.ones(model.num_query_groups, heads.shape[1] + 1, model.head_dim)  # the group's queries, and its key
    return f"{layer}.self_attention.linear_qkv.weight", torch.cat([ones, heads[:, :1]], dim=1).flatten()
