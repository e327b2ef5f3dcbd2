"""`GroupedLinear`: several products of equal shape, each with its own rows of one input (the experts of a mixture).

`_GroupedLinear.forward` takes `inp` first and the weights, then the biases last, and is called through `apply` or `forward(None, ...)`:
ModelOpt finds what to quantize by this. Parameters are `weight0`, `bias0`, `weight1`, ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch.cpp_extensions import general_gemm
from nemo_opt.cpu.transformer_engine.pytorch.module.base import (
    _DEFAULT_INIT,
    InitMethod,
    TransformerEngineBaseModule,
    activation_dtype,
    no_autocast,
    resolve_device,
    set_tensor_parallel_attributes,
)
from nemo_opt.cpu.transformer_engine.pytorch.module.linear import accumulate_wgrad
from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["GroupedLinear"]


@dataclass(frozen=True, kw_only=True)
class _GroupedOptions:
    m_splits: tuple[int, ...]
    use_bias: bool
    fuse_wgrad_accumulation: bool


class _GroupedLinear(torch.autograd.Function):
    """One product per group of rows."""

    @staticmethod
    def forward(ctx: Any, inp: torch.Tensor, options: _GroupedOptions, *weights_and_biases: torch.Tensor) -> torch.Tensor:
        num_gemms = len(options.m_splits)
        weights, biases = weights_and_biases[:num_gemms], weights_and_biases[num_gemms:]
        rows = inp.reshape(-1, inp.shape[-1])
        groups = rows.split(options.m_splits)
        products = [
            general_gemm(weight, group, bias=bias if options.use_bias else None)[0]
            for weight, group, bias in zip(weights, groups, biases, strict=True)
        ]
        if ctx is not None:
            ctx.save_for_backward(rows, *weights)
            ctx.options = options
            ctx.weights = weights
            ctx.inp_shape = inp.shape
        return torch.cat(products).reshape(*inp.shape[:-1], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        options = ctx.options
        num_gemms = len(weights)
        grads = grad_output.reshape(-1, grad_output.shape[-1]).split(options.m_splits)
        grad_inp = None
        if ctx.needs_input_grad[0]:
            pieces = [general_gemm(weight, grad, layout="NN", grad=True)[0] for weight, grad in zip(weights, grads, strict=True)]
            grad_inp = torch.cat(pieces).reshape(ctx.inp_shape)
        grad_weights: list[torch.Tensor | None] = [None] * num_gemms
        grad_biases: list[torch.Tensor | None] = [None] * num_gemms
        for i, (group, grad) in enumerate(zip(rows.split(options.m_splits), grads, strict=True)):
            if ctx.needs_input_grad[2 + i]:
                wgrad = general_gemm(group, grad, layout="NT", grad=True)[0]
                main_grad = ctx.weights[i].main_grad if options.fuse_wgrad_accumulation else None
                grad_weights[i] = accumulate_wgrad(ctx.weights[i], main_grad, wgrad)
            if ctx.needs_input_grad[2 + num_gemms + i]:
                grad_biases[i] = grad.sum(0)
        return grad_inp, None, *grad_weights, *grad_biases


class GroupedLinear(TransformerEngineBaseModule):
    """y_i = x_i W_i^T + b_i for groups of rows x_i.

    Args:
        num_gemms: number of groups.
        in_features: size of the input, before cutting.
        out_features: size of the output, before cutting.
        sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size, get_rng_state_tracker, rng_tracker_name, init_method, bias,
            return_bias, params_dtype, device: as for `Linear`.
        parallel_mode: "column" or "row" cut the weights, but nothing is communicated: the caller's token dispatcher does.
        ub_overlap_rs, ub_overlap_ag: refused when on.
        ub_name: without effect.
        delay_wgrad_compute: refused.
        save_original_input: without effect.
        name: name of the module.

    Raises:
        ConfigError: as for `Linear`.
    """

    single_grouped_weight = False
    single_grouped_bias = False

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        refuse_options(
            type(self).__name__,
            {"ub_overlap_rs": ub_overlap_rs, "ub_overlap_ag": ub_overlap_ag, "delay_wgrad_compute": delay_wgrad_compute},
        )
        if parallel_mode not in ("column", "row", None):
            raise ConfigError(f'{type(self).__name__}(parallel_mode={parallel_mode!r}): only "column", "row" and None exist.')
        self._set_parallel_state(tp_group, tp_size, sequence_parallel)
        cut = {"column": out_features, "row": in_features}.get(parallel_mode or "", 0)
        if cut % self.tp_size:
            raise ConfigError(f"{type(self).__name__}: {cut} features do not divide by tp_size={self.tp_size} in {parallel_mode} mode.")
        self.num_gemms = num_gemms
        self.parallel_mode = parallel_mode
        self.in_features = in_features // self.tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // self.tp_size if parallel_mode == "column" else out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        self.ub_name = ub_name
        self.save_original_input = save_original_input
        self.name = name
        self._get_rng_state_tracker = get_rng_state_tracker
        if rng_tracker_name is not None:
            self.rng_tracker_name = rng_tracker_name
        self._make_parameters(init_method or _DEFAULT_INIT, params_dtype or torch.get_default_dtype(), resolve_device(device))

    def _make_parameters(self, init: InitMethod, dtype: torch.dtype, device: torch.device) -> None:
        for i in range(self.num_gemms):
            weight = self._add_parameter(f"weight{i}", torch.empty(self.out_features, self.in_features, dtype=dtype, device=device), init)
            set_tensor_parallel_attributes(weight, True, 1 if self.parallel_mode == "row" else 0)
            if not self.use_bias:
                setattr(self, f"bias{i}", torch.empty(0, dtype=dtype, device=device))
                continue
            bias = self._add_parameter(f"bias{i}", torch.empty(self.out_features, dtype=dtype, device=device), torch.nn.init.zeros_)
            if self.parallel_mode == "row":
                bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            elif self.parallel_mode == "column":
                set_tensor_parallel_attributes(bias, True, 0)
        self.reset_parameters(defer_init=device.type == "meta")

    def forward(
        self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Multiply each group of rows by its weight.

        Args:
            inp: [..., in_features], the groups one after the other.
            m_splits: rows of each group.
            is_first_microbatch: when FP8 copies of weights are renewed; without effect.

        Returns:
            [..., out_features], and the list of biases if `return_bias`.

        Raises:
            ConfigError: the number of groups is not `num_gemms`.
        """
        splits = tuple(m_splits.tolist() if isinstance(m_splits, torch.Tensor) else m_splits)
        if len(splits) != self.num_gemms:
            raise ConfigError(f"GroupedLinear: {len(splits)} group sizes for num_gemms={self.num_gemms}.")
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        dtype = activation_dtype(type(self).__name__, inp, *weights, *biases)
        options = _GroupedOptions(m_splits=splits, use_bias=self.apply_bias, fuse_wgrad_accumulation=self.fuse_wgrad_accumulation)
        args = (inp.to(dtype), options, *[t.to(dtype) for t in (*weights, *biases)])
        with no_autocast():
            out = _GroupedLinear.apply(*args) if torch.is_grad_enabled() else _GroupedLinear.forward(None, *args)
        return (out, [bias.to(dtype) for bias in biases]) if self.return_bias else out
