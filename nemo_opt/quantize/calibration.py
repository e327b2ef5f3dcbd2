"""The calibration loop: a forward pass over batches without padding, on any layout.

Padding is refused, not masked: every activation that a quantizer sees enters its amax, and batches of packed tokens
(`nemo_opt.data.batches.calibration_batches`) hold no padding.
"""

from collections.abc import Iterable

import nemo_opt._stack

import torch.distributed as dist

from nemo_opt.errors import DataError
from nemo_opt.training.forward import Batch, ForwardLoop, forward_loop

__all__ = ["calibration_loop"]


def calibration_loop(batches: Iterable[Batch]) -> ForwardLoop:
    """What `Quantizer.quantize` takes as forward_loop, over this data-parallel rank's micro-batches; collective.

    Raises:
        DataError: on every rank, if any rank has no batch, if batches are padded, or if ranks of one data-parallel rank disagree.

    """
    kept = list(batches)
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, sum(map(_is_padded, kept)))
    if any(counts):
        raise DataError(f"calibration batches with padding (per rank: {counts}), which would enter every amax: pack the samples instead")
    return forward_loop(kept, description="calibrating")


def _is_padded(batch: Batch) -> bool:
    """Whether an `attention_mask` [B, S] (1 for real tokens) names padding; mcore's masks [B, 1, S, S] say nothing of it."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.dim() == 2 and not bool(mask.bool().all())
