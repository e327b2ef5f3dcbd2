"""A digest of a model's weights that is the same at every layout and layer spec, so that scores name the weights they belong to.

The bits of every element, times a number made of its place in the whole weight, are added modulo 2**64: sums can be made of the pieces
that ranks hold, in any order. It tells models apart; it is no cryptographic proof.
"""

import hashlib
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist

from nemo_opt.models.shards import Shard, parameter_shards

__all__ = ["weights_digest"]

_ROWS = 1024  # widened to int64 at a time, to bound memory
_ODD_A, _ODD_B = 0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(gpt_model: Any) -> str:
    """Hexadecimal digest of the whole model; collective, the same on every rank."""
    mine = {(shard.key, shard.offset): _checksum(shard) for shard in parameter_shards([gpt_model])}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sums: dict[str, int] = {}
    for (key, _), value in {place: value for ours in everyone for place, value in ours.items()}.items():
        sums[key] = (sums.get(key, 0) + value) % 2**64
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def _checksum(shard: Shard) -> int:
    """A summand of the weight's sum, not yet reduced modulo 2**64."""
    tensor = shard.tensor.reshape(shard.tensor.shape[0], -1)
    columns = _numbers(shard.offset[1] if len(shard.offset) > 1 else 0, tensor.shape[1], _ODD_B, tensor.device)
    total = 0
    for start in range(0, tensor.shape[0], _ROWS):
        bits = tensor[start : start + _ROWS].contiguous().view(_BITS[tensor.element_size()]).long()
        rows = _numbers(shard.offset[0] + start, bits.shape[0], _ODD_A, tensor.device)
        total += int(((bits * columns).sum(dim=1) * rows).sum())
    return total


def _numbers(start: int, count: int, factor: int, device: torch.device) -> torch.Tensor:
    """An odd number for each of the places start..start + count; int64 products wrap around, as they should."""
    places = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    return (places * factor) | 1
