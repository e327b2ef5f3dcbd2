"""`Linear`: a matrix product that is cut by columns or rows across tensor-parallel ranks, with its communication.

`_Linear.forward` names its tensors `weight`, `inp` and `bias` in this order, and is called through `_Linear.apply` or, without gradients,
`_Linear.forward(None, ...)`: ModelOpt finds the tensors to quantize by these names and replaces these two functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch._collectives import all_gather_first_dim, all_reduce, reduce_scatter_first_dim
from nemo_opt.cpu.transformer_engine.pytorch.cpp_extensions import general_gemm
from nemo_opt.cpu.transformer_engine.pytorch.module.base import (
    _DEFAULT_INIT,
    InitMethod,
    TransformerEngineBaseModule,
    activation_dtype,
    cast,
    get_dummy_wgrad,
    no_autocast,
    resolve_device,
    set_tensor_parallel_attributes,
)
from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["Linear", "LinearOptions"]


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """What a product needs to know besides its tensors."""

    group: ProcessGroup | None
    """Tensor-parallel ranks, or None for a product that is not cut."""

    parallel_mode: str | None
    """"column", "row" or None."""

    sequence_parallel: bool
    """Activations outside the pair of cut products are cut along dim 0."""

    fuse_wgrad_accumulation: bool
    """Add the weight's gradient to `weight.main_grad`."""

    @property
    def is_column(self) -> bool:
        """Cut by output features, with communication."""
        return self.group is not None and self.parallel_mode == "column"

    @property
    def is_row(self) -> bool:
        """Cut by input features, with communication."""
        return self.group is not None and self.parallel_mode == "row"


def gather_input(x: torch.Tensor, options: LinearOptions) -> torch.Tensor:
    """The whole input of a column-parallel product."""
    if options.is_column and options.sequence_parallel:
        assert options.group is not None
        return all_gather_first_dim(x, options.group)
    return x


def reduce_output(y: torch.Tensor, options: LinearOptions) -> torch.Tensor:
    """The sum of the partial outputs of a row-parallel product."""
    if not options.is_row:
        return y
    assert options.group is not None
    return reduce_scatter_first_dim(y, options.group) if options.sequence_parallel else all_reduce(y, options.group)


def gather_grad_output(grad: torch.Tensor, options: LinearOptions) -> torch.Tensor:
    """Backward of `reduce_output`."""
    if options.is_row and options.sequence_parallel:
        assert options.group is not None
        return all_gather_first_dim(grad, options.group)
    return grad


def reduce_grad_input(grad: torch.Tensor, options: LinearOptions) -> torch.Tensor:
    """Backward of `gather_input` and of using one input on several ranks."""
    if not options.is_column:
        return grad
    assert options.group is not None
    return reduce_scatter_first_dim(grad, options.group) if options.sequence_parallel else all_reduce(grad, options.group)


def accumulate_wgrad(weight: torch.Tensor, main_grad: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
    """Add a weight's gradient to its `main_grad` if it has one to add to; returns what autograd shall see."""
    if main_grad is None:
        return grad
    main_grad.add_(grad)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        return get_dummy_wgrad(list(grad.shape), grad.dtype, zero=bool(getattr(weight, "zero_out_wgrad", False)))
    return torch.zeros_like(grad)


def find_main_grad(weight: torch.Tensor, options: LinearOptions) -> torch.Tensor | None:
    """The buffer that collects a weight's gradient, where that is asked for.

    Raises:
        ConfigError: it is asked for but the weight has none.
    """
    if not options.fuse_wgrad_accumulation:
        return None
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ConfigError(
            "fuse_wgrad_accumulation=True needs weight.main_grad, which Megatron-Core's DistributedDataParallel makes. Wrap the model in "
            "it, or set gradient_accumulation_fusion=False."
        )
    return main_grad


class _Linear(torch.autograd.Function):
    """The product and its communication."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, inp: torch.Tensor, bias: torch.Tensor | None, options: LinearOptions) -> torch.Tensor:
        total_input = gather_input(inp, options)
        out = general_gemm(weight, total_input, bias=bias)[0]
        if ctx is not None:
            ctx.save_for_backward(weight, total_input if weight.requires_grad else None)
            ctx.options = options
            ctx.weight = weight
            ctx.main_grad = find_main_grad(weight, options) if weight.requires_grad else None
        return reduce_output(out, options)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, total_input = ctx.saved_tensors
        grad_output = gather_grad_output(grad_output, ctx.options)
        need_weight, need_input, need_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        if need_input:
            grad_input = reduce_grad_input(general_gemm(weight, grad_output, layout="NN", grad=True)[0], ctx.options)
        if need_weight:
            wgrad = general_gemm(total_input, grad_output, layout="NT", grad=True)[0]
            grad_weight = accumulate_wgrad(ctx.weight, ctx.main_grad, wgrad)
        if need_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_weight, grad_input, grad_bias, None


class Linear(TransformerEngineBaseModule):
    """y = x W^T + b, cut across tensor-parallel ranks on request.

    Args:
        in_features: size of the input, before cutting.
        out_features: size of the output, before cutting.
        sequence_parallel: the activations outside are cut along dim 0.
        fuse_wgrad_accumulation: add the weight's gradient to `weight.main_grad`.
        tp_group: tensor-parallel ranks.
        tp_size: their number, when the group comes later.
        get_rng_state_tracker: gives the tracker under whose state weights are initialised.
        rng_tracker_name: name of that state.
        init_method: fills the weight in place; normal with deviation 0.023 by default.
        bias: whether there is a bias.
        return_bias: return the bias beside the output instead of adding it.
        params_dtype: type of the parameters; torch's default if not given.
        parallel_mode: "column", "row" or None.
        parameters_split: refused.
        device: "meta" for parameters without memory.
        ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad: overlap with communication; refused when on.
        ub_name: name of the overlap's buffer; without effect when overlap is off.
        delay_wgrad_compute: refused.
        symmetric_ar_type: refused.
        save_original_input: without effect, as nothing is quantized for the backward pass.
        name: name of the module.

    Raises:
        ConfigError: an option that is refused is set, or sizes do not divide.
    """

    weight: torch.nn.Parameter
    bias: torch.Tensor

    def __init__(
        self,
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
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        refuse_options(
            type(self).__name__,
            {
                "parameters_split": parameters_split,
                "ub_overlap_ag": ub_overlap_ag,
                "ub_overlap_rs": ub_overlap_rs,
                "ub_overlap_rs_dgrad": ub_overlap_rs_dgrad,
                "ub_bulk_dgrad": ub_bulk_dgrad,
                "ub_bulk_wgrad": ub_bulk_wgrad,
                "delay_wgrad_compute": delay_wgrad_compute,
                "symmetric_ar_type": symmetric_ar_type,
            },
        )
        self.save_original_input = save_original_input
        self.ub_name = ub_name
        self.name = name
        self._set_features(in_features, out_features, parallel_mode, tp_group, tp_size, sequence_parallel)
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        # The bias of a row-parallel product belongs to the sum over ranks, not to each partial output.
        self.gemm_bias_unfused_add = self.apply_bias and parallel_mode == "row"
        self._get_rng_state_tracker = get_rng_state_tracker
        if rng_tracker_name is not None:
            self.rng_tracker_name = rng_tracker_name
        self._make_parameters(init_method or _DEFAULT_INIT, params_dtype or torch.get_default_dtype(), resolve_device(device))

    def _set_features(
        self, in_features: int, out_features: int, mode: str | None, tp_group: ProcessGroup | None, tp_size: int, sequence_parallel: bool
    ) -> None:
        if mode not in ("column", "row", None):
            raise ConfigError(f'{type(self).__name__}(parallel_mode={mode!r}): only "column", "row" and None exist.')
        self._set_parallel_state(tp_group, tp_size, sequence_parallel)
        cut = {"column": out_features, "row": in_features}.get(mode or "", 0)
        if cut % self.tp_size:
            raise ConfigError(f"{type(self).__name__}: {cut} features do not divide by tp_size={self.tp_size} in {mode} mode.")
        self.parallel_mode = mode
        self.in_features = in_features // self.tp_size if mode == "row" else in_features
        self.out_features = out_features // self.tp_size if mode == "column" else out_features

    def _make_parameters(self, init: InitMethod, dtype: torch.dtype, device: torch.device) -> None:
        weight = self._add_parameter("weight", torch.empty(self.out_features, self.in_features, dtype=dtype, device=device), init)
        set_tensor_parallel_attributes(weight, True, 1 if self.parallel_mode == "row" else 0)
        if self.use_bias:
            bias = self._add_parameter("bias", torch.empty(self.out_features, dtype=dtype, device=device), torch.nn.init.zeros_)
            if self.parallel_mode == "row":
                bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            elif self.parallel_mode == "column":
                set_tensor_parallel_attributes(bias, True, 0)
        else:
            self.bias = torch.empty(0, dtype=dtype, device=device)
        self.reset_parameters(defer_init=device.type == "meta")

    def _options(self) -> LinearOptions:
        return LinearOptions(
            group=self._communication_group(),
            parallel_mode=self.parallel_mode,
            sequence_parallel=self.sequence_parallel,
            fuse_wgrad_accumulation=self.fuse_wgrad_accumulation,
        )

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Multiply.

        Args:
            inp: [..., in_features].
            is_first_microbatch: when FP8 copies of weights are renewed; without effect.
            fp8_output: refused.
            fp8_grad: refused.

        Returns:
            [..., out_features], and the bias if `return_bias`.
        """
        if fp8_output or fp8_grad:
            refuse_options(type(self).__name__, {"fp8_output": fp8_output, "fp8_grad": fp8_grad})
        weight = self.weight
        bias = self.bias if self.apply_bias and not self.gemm_bias_unfused_add else None
        dtype = activation_dtype(type(self).__name__, inp, weight, self.bias)
        # Looked up at the call: ModelOpt replaces `apply` and `forward` while a quantized module runs.
        args = (cast(weight, dtype), cast(inp, dtype), None if bias is None else cast(bias, dtype), self._options())
        with no_autocast():
            out = _Linear.apply(*args) if torch.is_grad_enabled() else _Linear.forward(None, *args)
        if self.gemm_bias_unfused_add:
            out = out + cast(self.bias, dtype)
        return (out, cast(self.bias, dtype)) if self.return_bias else out
