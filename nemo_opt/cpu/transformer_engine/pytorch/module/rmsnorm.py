"""`RMSNorm` as a module of its own."""

import torch
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.module.layernorm import NormModule

__all__ = ["RMSNorm"]


class RMSNorm(NormModule):
    """x / root mean square * weight."""

    _has_bias = False

    def _normalise(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, gamma.shape, gamma, self.eps)
