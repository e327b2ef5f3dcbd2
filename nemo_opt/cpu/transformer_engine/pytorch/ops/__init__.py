"""Operations of Transformer Engine's operation fuser: activations, and the normalisation that also returns its input.

`Sequential` runs its operations one after the other. The fused multi-layer perceptrons of Megatron-Core (`use_transformer_engine_op_fuser`)
need operations that are not here, and say so.
"""

from typing import Any, NoReturn

import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.rmsnorm import RMSNorm
from nemo_opt.errors import ConfigError

__all__ = ["GEGLU", "GELU", "MakeExtraOutput", "RMSNorm", "ReGLU", "ReLU", "Sequential", "SwiGLU"]


class _Activation(torch.nn.Module):
    """An activation, computed in float32 at least; its result has the input's type.

    Args:
        cache_quantized_input: refused.

    Raises:
        ConfigError: the input is to be kept in FP8.
    """

    def __init__(self, *, cache_quantized_input: bool = False) -> None:
        super().__init__()
        if cache_quantized_input:
            raise ConfigError(f"{type(self).__name__}(cache_quantized_input=True) needs FP8; set activation_func_fp8_input_store=False.")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [..., F]; gated activations return [..., F / 2]."""
        return self._apply_wide(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class GELU(_Activation):
    """The tanh approximation of x times the normal distribution's share below x, as in Transformer Engine."""

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x, approximate="tanh")


class ReLU(_Activation):
    """max(x, 0)."""

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x)


class SwiGLU(_Activation):
    """silu(first half) times second half."""

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


class GEGLU(_Activation):
    """gelu(first half) times second half, in the tanh approximation."""

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * value


class ReGLU(_Activation):
    """relu(first half) times second half."""

    def _apply_wide(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.relu(gate) * value


class MakeExtraOutput(torch.nn.Module):
    """Passes its input on, and has the enclosing `Sequential` return it as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        return x


class Sequential(torch.nn.Sequential):
    """Operations one after the other."""

    def forward(self, inp: torch.Tensor) -> Any:  # type: ignore[override]
        """The result of the last operation, and what each `MakeExtraOutput` passed on."""
        extra = []
        for operation in self:
            inp = operation(inp)
            if isinstance(operation, MakeExtraOutput):
                extra.append(inp)
        return (inp, *extra) if extra else inp


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"transformer_engine.pytorch.ops.{name} is not in the CPU reference of Transformer Engine. If a Megatron-Core option asked for it, "
        f"switch the option off (use_transformer_engine_op_fuser, fused multi-layer perceptrons)."
    )
