"""Topology: how ranks are shared between tensor, pipeline, context, expert and data parallelism.

`axis` means an axis of the rank mesh. Validation needs no torch, so a wrong flag is refused before the stack is loaded.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemo_opt.errors import ConfigError

if TYPE_CHECKING:
    from nemo_opt.models.config import ModelConfig

__all__ = ["Topology"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the parallel axes. `dp` is what remains of the world when None."""

    tp: int = 1
    """Tensor parallel ranks: each weight matrix is split."""
    pp: int = 1
    """Pipeline parallel stages: layers are split."""
    vp: int = 1
    """Model chunks of one pipeline stage (interleaved schedule); 1 means not interleaved."""
    cp: int = 1
    """Context parallel ranks: the sequence is split through the whole model."""
    ep: int = 1
    """Expert parallel ranks; they lie inside the data parallel axis, as in Megatron-Core."""
    dp: int | None = None
    """Data parallel replicas; None means world_size // (tp * pp * cp)."""
    sp: bool = False
    """Sequence parallel: activations between tensor-parallel regions are split along the sequence."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage; None splits evenly."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage; None splits evenly."""
