"""Collectives over the first dim, without autograd: the modules' backward passes call them by hand, as Transformer Engine does."""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["all_gather_first_dim", "all_reduce", "reduce_scatter_first_dim"]


def all_gather_first_dim(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Concatenate every rank's [S, ...] along dim 0, in order of rank."""
    out = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter_first_dim(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sum over ranks and keep this rank's part of dim 0.

    Raises:
        ValueError: dim 0 does not divide by the number of ranks.
    """
    if x.shape[0] % group.size():
        raise ValueError(f"The first dim, {x.shape[0]}, does not divide by the {group.size()} ranks of the group.")
    out = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def all_reduce(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sum over ranks; the argument is not changed."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out
