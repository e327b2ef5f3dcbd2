"""Outputs of a layer's norms on either layer spec: Transformer Engine fuses a norm into the projection behind it and never shows it."""

from collections.abc import Callable
from typing import Any

import nemo_opt._stack

import torch
from megatron.core.transformer.identity_op import IdentityOp

__all__ = ["on_norm_output"]


def on_norm_output(norm: torch.nn.Module, linear: torch.nn.Module | None, callback: Callable[[torch.Tensor], None]) -> Any:
    """Calls `callback` with the norm's output in each forward pass; a fused norm's is computed again, differentiably, from its input.

    Args:
        norm: a layer's `input_layernorm` or `pre_mlp_layernorm`.
        linear: the projection behind it, into which it may be fused.
        callback: gets [S, B, H], of a fused norm in float32.

    Returns:
        The handle that removes the hook.

    """
    if isinstance(norm, IdentityOp):
        assert linear is not None, "a norm that is no module must be fused into a linear"
        return linear.register_forward_pre_hook(lambda module, args: callback(_normalised(module, args[0])))
    return norm.register_forward_hook(lambda _module, _args, output: callback(output))


def _normalised(linear: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the norm inside a TELayerNormColumnParallelLinear makes of its input."""
    config, x = linear.config, hidden_states.float()
    weight = linear.layer_norm_weight.float() + (1.0 if config.layernorm_zero_centered_gamma else 0.0)
    if config.normalization == "RMSNorm":
        return x * (x.pow(2).mean(dim=-1, keepdim=True) + config.layernorm_epsilon).rsqrt() * weight
    bias = linear.layer_norm_bias.float()
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, config.layernorm_epsilon)
