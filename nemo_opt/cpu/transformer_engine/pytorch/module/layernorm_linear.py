"""`LayerNormLinear`: a normalisation and a matrix product in one module.

What ModelOpt's plugin relies on: `_LayerNormLinear` and `general_gemm` are looked up in this module at each call (it replaces both while
a quantized module runs), `forward` takes (inp, ln_weight, ln_bias, weight, ...) and calls `general_gemm` once, and `backward` calls it
first for the gradient of the input and then for the gradient of the weight, with the product's unquantized input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch._collectives import reduce_scatter_first_dim
from nemo_opt.cpu.transformer_engine.pytorch.cpp_extensions import general_gemm
from nemo_opt.cpu.transformer_engine.pytorch.module._normalization import NormOptions, norm_backward, norm_forward
from nemo_opt.cpu.transformer_engine.pytorch.module.base import InitMethod, activation_dtype, cast, no_autocast, resolve_device
from nemo_opt.cpu.transformer_engine.pytorch.module.linear import (
    Linear,
    LinearOptions,
    accumulate_wgrad,
    find_main_grad,
    gather_grad_output,
    gather_input,
    reduce_grad_input,
    reduce_output,
)
from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["LayerNormLinear"]


@dataclass(frozen=True, kw_only=True)
class _FusedOptions:
    norm: NormOptions
    linear: LinearOptions
    return_layernorm_output: bool
    return_layernorm_output_gathered: bool


class _LayerNormLinear(torch.autograd.Function):
    """The normalisation, the product and the communication."""

    @staticmethod
    def forward(
        ctx: Any,
        inp: torch.Tensor,
        ln_weight: torch.Tensor,
        ln_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: _FusedOptions,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        ln_out, mean, rstd = norm_forward(inp, ln_weight, ln_bias, options.norm)
        total_input = gather_input(ln_out, options.linear)
        out = general_gemm(weight, total_input, bias=bias)[0]
        if ctx is not None:
            ctx.save_for_backward(inp, ln_weight, mean, rstd, weight, total_input)
            ctx.options = options
            ctx.weight = weight
            ctx.main_grad = find_main_grad(weight, options.linear) if weight.requires_grad else None
        out = reduce_output(out, options.linear)
        if not options.return_layernorm_output:
            return out
        returned = total_input if options.return_layernorm_output_gathered else ln_out
        return out, returned.clone() if ctx is not None else returned

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, ln_weight, mean, rstd, weight, total_input = ctx.saved_tensors
        options = ctx.options
        grad_output = gather_grad_output(grad_outputs[0], options.linear)
        # Always first, even where no gradient of the input is needed: ModelOpt counts the calls.
        grad_ln = reduce_grad_input(general_gemm(weight, grad_output, layout="NN", grad=True)[0], options.linear)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[3]:
            wgrad = general_gemm(total_input, grad_output, layout="NT", grad=True)[0]
            grad_weight = accumulate_wgrad(ctx.weight, ctx.main_grad, wgrad)
        if ctx.needs_input_grad[4]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        if options.return_layernorm_output:
            grad_ln = grad_ln + _local_part(grad_outputs[1], options)
        grad_inp, grad_ln_weight, grad_ln_bias = norm_backward(grad_ln, inp, ln_weight, mean, rstd, options.norm)
        return grad_inp, grad_ln_weight, grad_ln_bias if ctx.needs_input_grad[2] else None, grad_weight, grad_bias, None


def _local_part(grad: torch.Tensor, options: _FusedOptions) -> torch.Tensor:
    """The gradient of a returned normalisation output, for this rank's part of the sequence."""
    linear = options.linear
    if options.return_layernorm_output_gathered and linear.is_column and linear.sequence_parallel:
        assert linear.group is not None
        return reduce_scatter_first_dim(grad, linear.group)
    return grad


class LayerNormLinear(Linear):
    """y = norm(x) W^T + b.

    Args:
        in_features: size of the input, before cutting.
        out_features: size of the output, before cutting.
        eps: added to the variance or mean square.
        sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size, get_rng_state_tracker, init_method, bias: as for `Linear`.
        normalization: "LayerNorm" or "RMSNorm".
        return_bias, params_dtype, parallel_mode, parameters_split, device: as for `Linear`.
        return_layernorm_output: also return the output of the normalisation, this rank's part of it.
        return_layernorm_output_gathered: return all of it.
        zero_centered_gamma: the normalisation's weight is stored minus 1.
        kwargs: further arguments of `Linear`.

    Raises:
        ConfigError: as for `Linear`, or the normalisation is unknown.
    """

    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        **kwargs: Any,
    ) -> None:
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise ConfigError(f'LayerNormLinear(normalization={normalization!r}): only "LayerNorm" and "RMSNorm" exist.')
        self.normalization = normalization
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        super().__init__(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            parameters_split=parameters_split,
            device=device,
            **kwargs,
        )

    def _make_parameters(self, init: InitMethod, dtype: torch.dtype, device: torch.device) -> None:
        device = resolve_device(device)
        first = torch.nn.init.zeros_ if self.zero_centered_gamma else torch.nn.init.ones_
        parameters = [self._add_parameter("layer_norm_weight", torch.empty(self.in_features, dtype=dtype, device=device), first)]
        if self.normalization == "LayerNorm":
            shift = torch.empty(self.in_features, dtype=dtype, device=device)
            parameters.append(self._add_parameter("layer_norm_bias", shift, torch.nn.init.zeros_))
        else:
            self.layer_norm_bias = None
        for parameter in parameters:
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        super()._make_parameters(init, dtype, device)

    def _fused_options(self) -> _FusedOptions:
        return _FusedOptions(
            norm=NormOptions(kind=self.normalization, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma),
            linear=self._options(),
            return_layernorm_output=self.return_layernorm_output,
            return_layernorm_output_gathered=self.return_layernorm_output_gathered,
        )

    def forward(  # type: ignore[override]
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_grad: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Normalise and multiply.

        Args:
            inp: [..., in_features].
            is_first_microbatch: when FP8 copies of weights are renewed; without effect.
            fp8_grad: refused.

        Returns:
            [..., out_features]; then the bias if `return_bias`; then the normalisation's output if `return_layernorm_output`.
        """
        refuse_options(type(self).__name__, {"fp8_grad": fp8_grad})
        ln_weight, ln_bias, weight = self.layer_norm_weight, self.layer_norm_bias, self.weight
        bias = self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None
        dtype = activation_dtype(type(self).__name__, inp, ln_weight, ln_bias, weight, self.bias)
        args = (
            cast(inp, dtype),
            cast(ln_weight, dtype),
            None if ln_bias is None else cast(ln_bias, dtype),
            cast(weight, dtype),
            None if bias is None else cast(bias, dtype),
            self._fused_options(),
        )
        with no_autocast():
            result = _LayerNormLinear.apply(*args) if torch.is_grad_enabled() else _LayerNormLinear.forward(None, *args)
        out, *ln_out = result if isinstance(result, tuple) else (result,)
        if self.gemm_bias_unfused_add:
            out = out + cast(self.bias, dtype)
        outputs = (out, cast(self.bias, dtype), *ln_out) if self.return_bias else (out, *ln_out)
        return outputs if len(outputs) > 1 else out
