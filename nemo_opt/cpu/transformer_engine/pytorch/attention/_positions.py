"""Where a context-parallel rank's tokens stand in the sequence, and the exchange of keys and values between ranks.

The layout is Megatron-Core's: a sequence is cut into `2 * ranks` equal chunks and rank r holds chunks r and `2 * ranks - 1 - r`, so that
causal attention is equal work for all. Every exchange scheme of Transformer Engine (p2p, all_gather, a2a) computes the same attention;
here all are one all-gather of keys and values, whose gradient is the sum over ranks of each part's gradient.
"""

from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch._collectives import all_gather_first_dim, reduce_scatter_first_dim
from nemo_opt.errors import ConfigError

__all__ = ["gather_sequence", "rank_positions"]


def rank_positions(length: int, ranks: int, rank: int) -> torch.Tensor:
    """[length / ranks] positions of one rank's tokens in a sequence of `length` tokens.

    Raises:
        ConfigError: the sequence cannot be cut.
    """
    if ranks == 1:
        return torch.arange(length)
    if length % (2 * ranks):
        raise ConfigError(f"A sequence of {length} tokens cannot be cut into 2 * {ranks} equal chunks for context parallelism; pad it.")
    chunk = length // (2 * ranks)
    last = 2 * ranks - 1 - rank
    return torch.cat([torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(last * chunk, (last + 1) * chunk)])


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather_first_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_first_dim(grad, ctx.group), None


def gather_sequence(key: torch.Tensor, value: torch.Tensor, group: ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's keys and values [S, ..., D], concatenated along dim 0 in order of rank, in one exchange."""
    both = _GatherSequence.apply(torch.cat([key, value], dim=-1), group)
    gathered_key, gathered_value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
    return gathered_key, gathered_value
