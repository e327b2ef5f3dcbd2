"""Imported once by the server that forks test ranks, so that a rank starts in half a second instead of twenty.

Decisions: one compute thread a rank (several ranks share few cores), and no CUDA context before the fork, which a child could not use.
"""

import os
from importlib import import_module

__all__ = ["MODULES"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

MODULES = (
    "nemo_opt._stack",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "modelopt.torch.distill",
    "modelopt.torch.opt",
    "modelopt.torch.prune",
    "modelopt.torch.quantization",
)
"""What the tests' functions import sooner or later; the first one activates the device backend."""

for _name in MODULES:
    import_module(_name)
