"""Imported once by the server that forks test ranks, so that a rank starts in half a second instead of twenty.

Decisions: one compute thread a rank (several ranks share few cores), and no CUDA context before the fork, which a child could not use.
What is loaded is taken from the garbage collector: a collection in a rank would visit, and so copy, every page that ranks share.
"""

import gc
import os
import warnings
from importlib import import_module
from importlib.util import find_spec

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

_OF_TESTS = ("pytest", "hypothesis")  # what test modules import at their top; absent where only the package is installed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the test process shows upstream's once already
    for _name in (*MODULES, *filter(find_spec, _OF_TESTS)):
        import_module(_name)

gc.collect()
gc.freeze()
