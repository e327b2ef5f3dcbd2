"""Megatron-Core 0.19: the places that insist on CUDA, one by one.

Importing this module registers the patches; `nemo_opt.cpu.patches.install` applies them as Megatron's modules are loaded.
"""

import copy
import logging
from types import ModuleType
from typing import Any

from nemo_opt.cpu.patches import replace, retarget, when_loaded

__all__: list[str] = []


@when_loaded(
    "megatron.core.jit:disable_jit_fuser",
    reason="torch.compile would need a C++ compiler and half a minute for each small function; eager they compute the same",
)
def _eager_fusions(module: ModuleType) -> None:
    module.disable_jit_fuser()


_FLOAT = {"torch.cuda.FloatTensor": "torch.FloatTensor"}
_HALVES = {"torch.cuda.HalfTensor": "torch.HalfTensor", "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor"}

for _target, _constants in (
    ("optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__", _FLOAT | _HALVES),
    ("optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups", _FLOAT | _HALVES),
    ("optimizer.distrib_optimizer:DistributedOptimizer.__init__", _HALVES),
    ("optimizer.clip_grads:clip_grad_by_total_norm_fp32", _FLOAT),
):
    retarget(
        f"megatron.core.{_target}",
        reason="compares Tensor.type() with the names of CUDA tensor types; in main memory the same dtypes have other names",
        constants=_constants,
    )

retarget(
    "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
    reason="converts split sizes to numpy only for CUDA tensors, and its callers want numpy",
    names={"is_cuda": "is_cpu"},
)

retarget(
    "megatron.core.inference.communication_utils:_is_cuda",
    reason="asserts that what pipeline stages exchange at inference lies on a GPU; ModelOpt's generation and prefill go through it",
    names={"is_cuda": "is_cpu"},
)


@when_loaded(
    "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
    reason="warns at every fork that the CPU's random state changed: here device and CPU share it by design, and fork puts it back",
)
def _quiet_fork(module: ModuleType) -> None:
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage())


@replace(
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
    reason="refuses sequence parallelism only because torch's norms do not mark their weights; marked, the gradients are summed",
    parameters=("cls", "config", "hidden_size", "eps", "persist_layer_norm", "zero_centered_gamma", "normalization"),
)
def _sequence_parallel_norm(original: Any) -> Any:
    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(__new__)
