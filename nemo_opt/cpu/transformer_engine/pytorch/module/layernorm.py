"""`LayerNorm` as a module of its own, and what it shares with `RMSNorm`; results have the weight's type (or autocast's)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.base import TransformerEngineBaseModule, resolve_device
from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["LayerNorm", "NormModule"]


class NormModule(TransformerEngineBaseModule):
    """What both have in common.

    Args:
        normalized_shape: size of the last dim (or dims).
        eps: added to the variance or mean square.
        sequence_parallel: the activations are cut along dim 0, so gradients of the parameters are partial sums.
        params_dtype: type of the parameters; torch's default if not given.
        zero_centered_gamma: the weight is stored minus 1.
        hidden_size: older name of `normalized_shape`.
        device: "meta" for parameters without memory.
        dtype: newer name of `params_dtype`.
        kwargs: settings of GPU kernels (`fwd_ln_sm_margin` and the like), refused unless 0 or None.
    """

    _has_bias: bool
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse_options(type(self).__name__, kwargs, dict.fromkeys(kwargs, 0))
        shape = normalized_shape if normalized_shape is not None else hidden_size
        if shape is None:
            raise ConfigError(f"{type(self).__name__} needs normalized_shape.")
        self.normalized_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.hidden_size = self.normalized_shape[-1]
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.sequence_parallel = bool(sequence_parallel)
        dtype = dtype or params_dtype or torch.get_default_dtype()
        device = resolve_device(device)
        first = torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_
        parameters = [self._add_parameter("weight", torch.empty(self.normalized_shape, dtype=dtype, device=device), first)]
        if self._has_bias:
            parameters.append(
                self._add_parameter("bias", torch.empty(self.normalized_shape, dtype=dtype, device=device), torch.nn.init.zeros_)
            )
        for parameter in parameters:
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters(defer_init=device.type == "meta")

    def reset_layer_norm_parameters(self) -> None:
        """Older name of `reset_parameters`."""
        self.reset_parameters()

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H] over its last dim; the result has the weight's type, or autocast's."""
        weight = self.weight
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        gamma = weight.to(wide) + 1 if self.zero_centered_gamma else weight.to(wide)
        return self._normalise(inp.to(dtype).to(wide), gamma).to(dtype)

    def _normalise(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class LayerNorm(NormModule):
    """(x - mean) / deviation * weight + bias."""

    _has_bias = True

    def _normalise(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, gamma.shape, gamma, self.bias.to(x.dtype), self.eps)
