"""Second moments of a linear's inputs, summed over micro-batches and ranks.

Decisions: float32 sums; 16-bit inputs on a GPU are multiplied as they are and summed in float32, which is exact as their products are.
A row parallel linear's ranks see different columns of the same tokens: each gathers all columns and keeps its rows of the matrix.
"""

import torch
import torch.distributed as dist

__all__ = ["GramStatistics"]


class GramStatistics:
    """G = sum of x^T x, and the mean of |x|, over all tokens of all ranks.

    Args:
        channels: columns of x on this rank.
        columns: ranks that hold the other columns of the same tokens; None if this one has all.
        parts: ranks that hold other tokens of the same sequences (sequence parallelism), or None.
        replicas: ranks that see other data with the same weights, or None.
        device: of the sums.

    """

    def __init__(
        self,
        channels: int,
        *,
        columns: dist.ProcessGroup | None = None,
        parts: dist.ProcessGroup | None = None,
        replicas: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._columns, self._over = columns, [group for group in (parts, replicas) if group is not None]
        width = channels * (1 if columns is None else columns.size())
        self._gram = torch.zeros(channels, width, dtype=torch.float32, device=device)
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Adds the tokens of `x` [..., channels]; rows of zeros are padding and not counted. Collective over `columns`."""
        x = x.detach().flatten(0, -2)
        everything = self._gathered(x)
        self._gram += _product(x, everything)
        self._sum += x.abs().sum(dim=0, dtype=torch.float32)
        self._tokens += (everything != 0).any(dim=1).sum()

    def reduce(self) -> None:
        """Sums over all ranks; collective, once, after the last `add`."""
        for group in self._over:
            for total in (self._gram, self._sum, self._tokens):
                dist.all_reduce(total, group=group)

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self._tokens)

    @property
    def mean(self) -> torch.Tensor:
        """[channels] mean |x|, float32."""
        return (self._sum / self._tokens).float()

    @property
    def is_finite(self) -> bool:
        """Whether no input was infinite or NaN."""
        return bool(self._sum.isfinite().all())

    def squared_norm(self, change: torch.Tensor) -> torch.Tensor:
        """|| x change^T ||^2, of which the sum over `columns` is the whole; collective over `columns`.

        Args:
            change: [out, channels] float32, this rank's columns.

        """
        return (change @ self._gram).mul_(self._gathered(change)).sum()

    def clear(self) -> None:
        """Frees the matrix."""
        self._gram = self._gram.new_zeros(0, 0)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """All columns, in order of rank."""
        if self._columns is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self._columns.size())]
        dist.all_gather(parts, x.contiguous(), group=self._columns)
        return torch.cat(parts, dim=1)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T right in float32."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()
