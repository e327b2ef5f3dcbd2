"""Weights of a quantised model, rounded once for all micro-batches of a pass that does not change them.

ModelOpt rounds a weight whenever its layer is called: right in training, where weights move, and a fifth to a third of a forward pass on
CPUs (benchmarks/test_quantised_forward.py). ModelOpt's own `fold_weight` overwrites the weights for good. On GPUs nothing changes: a kernel
rounds at the speed of memory, and a second copy of the weights may not fit there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import nemo_opt._stack

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

__all__ = ["rounded_once"]

type _Key = tuple[int, tuple[int, ...], tuple[int, ...]]


@contextmanager
def rounded_once(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within, each quantised weight of `chunks` is rounded at its first use without gradients, and kept: one copy of these weights.

    Neither weights nor amax may change meanwhile. Nested, the outer one rounds.
    """
    quantizers = [quantizer for chunk in chunks for quantizer in _weight_quantizers(chunk) if "forward" not in vars(quantizer)]
    for quantizer in quantizers:
        vars(quantizer)["forward"] = _remembering(quantizer.forward)
    try:
        yield
    finally:
        for quantizer in quantizers:
            del vars(quantizer)["forward"]


def _weight_quantizers(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Those that round weights on a CPU now; the first of those that follow one another stands for all of them."""
    if any(parameter.is_cuda for parameter in chunk.parameters()):
        return []
    found: dict[str, torch.nn.Module] = {}
    for name, module in chunk.named_modules():
        if "weight_quantizer" in name.split(".") and isinstance(module, TensorQuantizer | SequentialQuantizer):
            parent = name.rpartition(".")[0]
            if parent not in found and _rounds(module):
                found[name] = module
    return list(found.values())


def _rounds(module: torch.nn.Module) -> bool:
    stages = [stage for stage in module.modules() if isinstance(stage, TensorQuantizer)]
    return any(stage.is_enabled for stage in stages) and not any(stage._if_calib for stage in stages)


def _remembering(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`forward` of a quantizer, which may be of several weights: experts can share one."""
    kept: dict[_Key, torch.Tensor] = {}

    def remembering(weight: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return forward(weight)
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        if key not in kept:
            kept[key] = forward(weight)
        return kept[key]

    return remembering
