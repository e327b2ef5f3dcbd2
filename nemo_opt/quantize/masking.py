"""Keeps padding out of everything that calibration measures.

Method: while a micro-batch with padding runs, every activation quantizer gets its input with the rows of padding set to zero, before it, or
any other hook on it, looks. Zero changes no maximum of |x|, no sum of |x| and no Gram matrix, so each statistic is the one of the real
tokens alone. The zeros go on through the model, which no real token can tell: padding stands behind the tokens under causal attention,
and everything else works on each token alone. Experts get tokens in the router's order, so for them padding is set to zero
before the router; it stays zero through experts without bias.

A tensor whose rows cannot be told apart is an error, never let through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nemo_opt._stack

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.errors import ConfigError
from nemo_opt.training.forward import Batch, tokens_in_order

__all__ = ["padding_masked", "zero_padding"]


@contextmanager
def padding_masked(chunk: torch.nn.Module, batch: Batch) -> Iterator[None]:
    """While it is entered, quantizers of `chunk` see padding of `batch` (attention_mask [B, S], 1 for real tokens) as zeros.

    Raises:
        ConfigError: during a forward pass, if a quantizer's input does not show which rows are which tokens.

    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        yield
        return
    real = tokens_in_order(chunk, batch, mask.bool())
    handles = [module.register_forward_pre_hook(_zeroing(name, real), prepend=True) for name, module in _places(chunk)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero_padding(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    """`x` with padded rows zero; None if its shape does not say which rows are which tokens.

    Args:
        x: [S, B, ...], of one sequence also [S, ...]; or this tensor-parallel rank's part of S (sequence parallelism).
        real: [S, B], False for padding.

    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if tp > 1 and x.shape[0] * tp == real.shape[0]:
        real = real.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
    if x.dim() < 2 or x.shape[0] != real.shape[0]:
        return None
    if real.shape[1] == 1:
        real = real[:, 0]
    elif x.shape[1] != real.shape[1]:
        return None
    return x.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - real.dim())), 0)


def _places(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Activation quantizers outside of routed experts, and the layers that route."""
    for name, module in chunk.named_modules():
        is_routed = ".experts." in name
        if isinstance(module, MoELayer) or (isinstance(module, TensorQuantizer) and not is_routed and "weight_quantizer" not in name):
            yield name, module


def _zeroing(name: str, real: torch.Tensor) -> Any:
    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = arguments
        zeroed = zero_padding(x, real)
        if zeroed is None:
            raise ConfigError(
                f"{name} sees a tensor of shape {tuple(x.shape)}, which does not show its {tuple(real.shape)} tokens (sequence, batch), "
                "so padding cannot be told apart: use packing='pack'"
            )
        return (zeroed, *rest)

    return hook
