"""`transformer_engine.pytorch`: the modules, re-exported under the names the real package uses."""

from typing import NoReturn

from nemo_opt.cpu.transformer_engine.pytorch import (
    attention,
    cpp_extensions,
    distributed,
    fp8,
    module,
    ops,
    tensor,
)
from nemo_opt.cpu.transformer_engine.pytorch.attention import DotProductAttention
from nemo_opt.cpu.transformer_engine.pytorch.distributed import CudaRNGStatesTracker, checkpoint
from nemo_opt.cpu.transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from nemo_opt.cpu.transformer_engine.pytorch.module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)

__all__ = [
    "CudaRNGStatesTracker",
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "attention",
    "checkpoint",
    "cpp_extensions",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "module",
    "ops",
    "tensor",
]


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"transformer_engine.pytorch.{name} is not in the CPU reference of Transformer Engine; it has {', '.join(__all__)}."
    )
