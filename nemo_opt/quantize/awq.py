"""AWQ's search for scales from one pass of Gram matrices, over ModelOpt's quantizers and its bookkeeping.

Method: Lin et al., AWQ, https://arxiv.org/abs/2306.00978, section 3.2; upstream: `modelopt.torch.quantization.model_calib.awq_lite`.
For each alpha, a linear's weight W is scaled by s(alpha), quantised and scaled back; the alpha is taken whose outputs differ least.
Upstream runs all of them on each micro-batch, 11 matrix products a linear. But with x the inputs and D the change of the weight,
|| x D^T ||^2 = tr(D G D^T), where G = x^T x is summed once. Upstream's search leaves activations unquantised, also for formats that
quantise them, so this is the same search for all.

Decisions:
- Every layout finds the scales of a single rank: sums run over data and context parallel ranks, over sequence parallel parts, over rows of
  column parallel weights; a row parallel linear gathers its inputs, so that products between columns of different ranks count. Upstream
  lets each tensor parallel rank choose an alpha for its own rows, and averages scales, not statistics.
- Means are over real tokens, upstream's over micro-batches: equal where all have one size.
- Cost: G is [in, in] in float32 for each linear of this rank ([in / tp, in] for row parallel ones), held until the search; for each alpha
  a product of [out, in] with G, and for row parallel linears an all-gather of [out, in] in float32.
- ModelOpt records the algorithm as its own `awq_lite`, so checkpoints restore without us.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from modelopt.torch.quantization.mode import AWQLiteModeDescriptor
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth, max_calibrate
from modelopt.torch.quantization.nn import SequentialQuantizer
from modelopt.torch.quantization.utils import (
    is_quantized_column_parallel_linear,
    is_quantized_linear,
    is_quantized_row_parallel_linear,
)

from nemo_opt.collective import on_each
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.quantize.gram import GramStatistics
from nemo_opt.training.forward import ForwardLoop

__all__ = ["awq_alphas", "awq_scale", "calibrate_awq"]

_LIMITS = (1e-4, 1e4)  # upstream's
_TINY = torch.finfo(torch.float32).tiny


def calibrate_awq(model: torch.nn.Module, forward_loop: ForwardLoop, *, alpha_step: float = 0.1) -> dict[str, float]:
    """Calibrates a model whose quantizers are inserted but not calibrated, as ModelOpt's awq_lite does; collective.

    Args:
        model: a GPTModel; linears with an enabled weight quantizer get a `pre_quant_scale`, and weights divided by it.
        forward_loop: shows calibration data; called once.
        alpha_step: distance of the alphas tried, from 0 to 1.

    Returns:
        name of each of this rank's linears -> the alpha chosen.

    Raises:
        ConfigError: a linear holds the weights of several experts, which upstream's search does not take either.
        DataError: on every rank, if activations are not finite.

    """
    _check_linears(model)
    found: dict[str, float] = {}

    def search(model: torch.nn.Module, forward_loop: ForwardLoop, alpha_step: float, **_: Any) -> None:
        found.update(_calibrate(model, forward_loop, alpha_step))

    with _in_place_of_upstreams(search):
        mtq.calibrate(model, algorithm={"method": "awq_lite", "alpha_step": alpha_step}, forward_loop=forward_loop)
    return found


def awq_alphas(alpha_step: float) -> list[float]:
    """The alphas that upstream tries: multiples of the step in float32, from 0 to 1."""
    return [float(alpha) for alpha in torch.arange(0, 1.0 + alpha_step, alpha_step)]


def awq_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """a^alpha / w^(1 - alpha) within limits, not yet normalised, [channels].

    Args:
        activation: mean |x| of each channel.
        weight: mean of |w| / largest |w| of its block, of each channel.
        alpha: how much activations decide.

    """
    return (activation.pow(alpha) / (weight.pow(1 - alpha) + _TINY)).clamp(*_LIMITS)


@contextmanager
def _in_place_of_upstreams(search: Any) -> Iterator[None]:
    """While it is entered, ModelOpt's mode awq_lite calibrates by `search`."""
    upstream = AWQLiteModeDescriptor._calib_func
    AWQLiteModeDescriptor._calib_func = search
    try:
        yield
    finally:
        AWQLiteModeDescriptor._calib_func = upstream


def _check_linears(model: torch.nn.Module) -> None:
    grouped = [name for name, module in _searched(model) if getattr(module, "weight", None) is None]
    if grouped:
        raise ConfigError(f"AWQ cannot scale {grouped[0]}, which holds the weights of several experts: use the layer spec local")


def _searched(model: torch.nn.Module) -> list[tuple[str, Any]]:
    def is_enabled(quantizer: Any) -> bool:
        return bool((quantizer[0] if isinstance(quantizer, torch.nn.ModuleList | SequentialQuantizer) else quantizer).is_enabled)

    return [(name, module) for name, module in model.named_modules() if is_quantized_linear(module) and is_enabled(module.weight_quantizer)]


@torch.no_grad()
def _calibrate(model: torch.nn.Module, forward_loop: ForwardLoop, alpha_step: float) -> dict[str, float]:
    sequential = [module for _, module in _searched(model) if isinstance(module.weight_quantizer, SequentialQuantizer)]
    alphas = {}
    with SequentialQuantizer.convert_to_single_quantizer(model):
        searches = [_Search(name, module) for name, module in _searched(model)]
        _observe(model, forward_loop, searches)
        on_each(lambda: _check_finite(searches))
        for search in searches:
            alphas[search.name] = search.finish(awq_alphas(alpha_step))
    for linear in sequential:  # their second quantizers have seen nothing yet
        max_calibrate(linear, lambda module: module.weight_quantizer(module.weight))
    return alphas


def _observe(model: torch.nn.Module, forward_loop: ForwardLoop, searches: list["_Search"]) -> None:
    """One pass that finds amax of activations, and the statistics of every search."""
    with ExitStack() as stack:
        for search in searches:
            stack.enter_context(search.observing())
        max_calibrate(model, forward_loop)
    for search in searches:
        search.statistics.reduce()


def _check_finite(searches: list["_Search"]) -> None:
    bad = [search.name for search in searches if not search.statistics.is_finite]
    if bad:
        raise DataError(f"{len(bad)} linears have inputs that are not finite, first {bad[0]}: look for NaN in weights or activations")


class _Search:
    """One linear's search."""

    def __init__(self, name: str, linear: Any) -> None:
        self.name, self.linear = name, linear
        group = linear.parallel_state.tensor_parallel_group
        self.is_row = is_quantized_row_parallel_linear(linear)
        self.is_column = is_quantized_column_parallel_linear(linear)
        self.tp_group = group.group if group.is_initialized() and group.world_size() > 1 and (self.is_row or self.is_column) else None
        is_routed = ".experts." in name
        self.statistics = GramStatistics(
            linear.weight.shape[1],
            columns=self.tp_group if self.is_row else None,
            parts=self.tp_group if self.is_column and getattr(linear, "sequence_parallel", False) and not is_routed else None,
            replicas=linear.parallel_state.data_parallel_group.group
            if linear.parallel_state.data_parallel_group.is_initialized()
            else None,
            device=linear.weight.device,
        )
        quantizer = linear.input_quantizer
        self.quantizes_input = bool(quantizer.is_enabled)
        if self.quantizes_input and quantizer.axis not in (None, -1):
            raise ConfigError(f"{name}: AWQ needs activations quantised per tensor or channel, not along axis {quantizer.axis}")

    @contextmanager
    def observing(self) -> Iterator[None]:
        """While it is entered, inputs are summed up and weights are left alone."""
        quantizer, weight_quantizer = self.linear.input_quantizer, self.linear.weight_quantizer
        if self.quantizes_input:
            quantizer.axis = -1  # one amax for each channel
        weight_quantizer.disable()
        handle = quantizer.register_forward_pre_hook(lambda _, inputs: self.statistics.add(inputs[0]))
        try:
            yield
        finally:
            handle.remove()
            weight_quantizer.enable()
            weight_quantizer.reset_amax()

    def finish(self, alphas: list[float]) -> float:
        """Finds the best alpha, leaves the linear scaled and calibrated, and forgets the statistics."""
        if self.quantizes_input:
            self._one_amax_for_all_channels()
        if not self.statistics.tokens:  # an expert that no token came to, as upstream
            apply_pre_quant_scale_and_smooth(self.linear, torch.ones_like(self.linear.weight[0]))
            return 0.0
        activation, weight = self.statistics.mean, self._weight_profile()
        losses = torch.stack([self._loss(self._normalised(awq_scale(activation, weight, alpha))) for alpha in alphas])
        if self.tp_group is not None:
            dist.all_reduce(losses, group=self.tp_group)
        best = alphas[int(losses.argmin())]
        scale = self._normalised(awq_scale(activation, weight, best))
        apply_pre_quant_scale_and_smooth(self.linear, 1.0 / scale)
        self.statistics.clear()
        return best

    def _one_amax_for_all_channels(self) -> None:
        quantizer = self.linear.input_quantizer
        amax = quantizer.amax
        if amax is not None:
            quantizer._amax_for_smoothing = amax.detach().cpu()
            quantizer.reset_amax()
        quantizer.axis = None
        if amax is not None:
            quantizer.amax = amax.amax()  # replaced by that of the scaled activations

    def _weight_profile(self) -> torch.Tensor:
        """[in] mean over all rows of |w| / (largest |w| of its block)."""
        weight = self.linear.weight.detach()
        rows, columns = weight.shape
        size = _block_size(self.linear.weight_quantizer) or columns
        blocks = torch.nn.functional.pad(weight.abs(), (0, -columns % size)).view(rows, -1, size)
        largest = blocks.amax(dim=2, keepdim=True)
        if self.is_row and self.tp_group is not None and not _block_size(self.linear.weight_quantizer):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.tp_group)
        relative = blocks / (largest + torch.finfo(weight.dtype).tiny)
        total = relative.view(rows, -1)[:, :columns].sum(dim=0, dtype=torch.float32)
        if self.is_column and self.tp_group is not None:
            dist.all_reduce(total, group=self.tp_group)
            rows *= self.tp_group.size()
        mean: torch.Tensor = total / rows
        return mean

    def _normalised(self, scale: torch.Tensor) -> torch.Tensor:
        """Largest and smallest of all channels have the product 1."""
        ends = torch.stack([scale.max(), -scale.min()])
        if self.is_row and self.tp_group is not None:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.tp_group)
        normalised: torch.Tensor = scale / (ends[0] * -ends[1]).sqrt()
        return normalised

    def _loss(self, scale: torch.Tensor) -> torch.Tensor:
        """|| x D^T ||^2, D the change of the weight by quantisation under `scale`; this rank's part."""
        weight = self.linear.weight.detach()
        quantised = self._quantised(weight * scale.to(weight.dtype))
        return self.statistics.squared_norm(quantised.float() * (1 / scale).to(weight.dtype).float() - weight.float())

    def _quantised(self, weight: torch.Tensor) -> torch.Tensor:
        quantizer = self.linear.weight_quantizer
        if self.tp_group is not None and (amax := _amax_beyond_blocks(quantizer, weight)) is not None:
            if self.is_row or amax.numel() == 1:
                dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.tp_group)
            quantizer.amax = amax
        result: torch.Tensor = quantizer(weight)
        quantizer.reset_amax()
        return result


def _amax_beyond_blocks(quantizer: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """Amax that other ranks' weights may raise: of the tensor or of rows; None for blocks, which lie on one rank."""
    if quantizer.block_sizes is not None and quantizer.block_sizes.get("type") != "dynamic":
        return None
    return weight.abs().amax() if quantizer.axis is None else weight.abs().amax(dim=1, keepdim=True)


def _block_size(quantizer: Any) -> int | None:
    """Weights of a row that share a scale; None where the whole row does."""
    sizes = quantizer.block_sizes
    return None if sizes is None else int(sizes[-1] if -1 in sizes else sizes[1])
