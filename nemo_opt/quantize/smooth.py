"""SmoothQuant's search for scales, over ModelOpt's quantizers and its bookkeeping.

Method: Xiao et al., SmoothQuant, https://arxiv.org/abs/2211.10438, equation 4; upstream: `modelopt.torch.quantization.model_calib`.

Decisions, each a difference from upstream:
- With grouped-query attention, the channels of `linear_proj` that multiply one value channel (those of a group's query heads) share a
  scale, made from their largest activation and weight. Then every scale of the model can be folded into the layer before, and an export
  is an ordinary INT8 model, which engines read; upstream gives each channel its own, which nothing can be folded into.
- A channel that is always zero keeps the scale 1; upstream's test for it comes after the division by zero, whose infinity passes it.
"""

from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth
from modelopt.torch.quantization.utils import is_quantized_column_parallel_linear, is_quantized_linear

from nemo_opt.training.forward import ForwardLoop

__all__ = ["smooth_scale", "smoothquant"]

_LIMITS = (1e-4, 1e4)  # upstream's


@torch.no_grad()
def smoothquant(model: torch.nn.Module, forward_loop: ForwardLoop, *, alpha: float) -> None:
    """Calibrates a model whose quantizers are inserted but not calibrated; collective.

    Args:
        model: a GPTModel; its INT8 linears get a `pre_quant_scale`, and weights divided by it.
        forward_loop: shows calibration data.
        alpha: how much of the difficulty moves from activations to weights, 0..1.

    """
    linears = {name: module for name, module in model.named_modules() if is_quantized_linear(module) and _is_int8(module)}
    for linear in linears.values():
        linear.input_quantizer.axis = -1  # one amax for each channel
    mtq.calibrate(model, algorithm="max", forward_loop=forward_loop)
    for name, linear in linears.items():
        _smooth(linear, alpha, group=_query_group(linear) if name.endswith("linear_proj") else None)


def smooth_scale(act_amax: torch.Tensor, weight_amax: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """Equation 4 of the paper as ModelOpt's `pre_quant_scale`, which multiplies activations: w^(1 - alpha) / a^alpha, [channels]."""
    scale = weight_amax.float().pow(1 - alpha) / act_amax.float().pow(alpha)
    return torch.where((act_amax > 0) & (weight_amax > 0), scale, 1.0).clamp(*_LIMITS)


def _smooth(linear: Any, alpha: float, group: tuple[int, int] | None) -> None:
    act_amax = linear.input_quantizer.amax.detach().float().flatten()
    weight_amax = linear.weight.detach().abs().amax(dim=0).float()
    if is_quantized_column_parallel_linear(linear) and parallel_state.get_tensor_model_parallel_world_size() > 1:
        for amax in (act_amax, weight_amax):  # ranks see parts of the sequence, and hold parts of the rows
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    shared = [amax if group is None else _largest_of_group(amax, *group) for amax in (act_amax, weight_amax)]
    quantizer = linear.input_quantizer
    quantizer._amax_for_smoothing = act_amax
    quantizer.reset_amax()
    quantizer.axis = None
    quantizer.amax = act_amax.amax()  # replaced by that of the smoothed activations
    apply_pre_quant_scale_and_smooth(linear, smooth_scale(*shared, alpha=alpha))
    del quantizer._amax_for_smoothing


def _largest_of_group(amax: torch.Tensor, query_heads: int, head_dim: int) -> torch.Tensor:
    """[heads * head_dim], heads of a group one after the other: each channel's largest over its group."""
    by_group = amax.view(-1, query_heads, head_dim)
    return by_group.amax(dim=1, keepdim=True).expand_as(by_group).reshape(-1)


def _query_group(linear: Any) -> tuple[int, int] | None:
    """(query heads of a group, head dim); None where each query head has a value head of its own."""
    config = linear.config
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    return None if heads == groups else (heads // groups, config.kv_channels)


def _is_int8(linear: Any) -> bool:
    input_quantizer, weight_quantizer = linear.input_quantizer, linear.weight_quantizer
    return bool(input_quantizer.is_enabled and weight_quantizer.is_enabled) and input_quantizer.num_bits == weight_quantizer.num_bits == 8
