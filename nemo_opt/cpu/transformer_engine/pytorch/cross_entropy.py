"""Cross entropy over a vocabulary that is cut across ranks; loss and gradient in float32."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nemo_opt.errors import ConfigError

__all__ = ["parallel_cross_entropy"]


def _reduce(x: torch.Tensor, group: ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


class _CrossEntropy(torch.autograd.Function):
    """Keeps this rank's part of the probabilities for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, smoothing: float, group: ProcessGroup | None, ignore: int
    ) -> torch.Tensor:
        vocabulary = logits.shape[-1]
        first = 0 if group is None else group.rank() * vocabulary
        total = vocabulary * (1 if group is None else group.size())
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shifted = wide - _reduce(wide.amax(-1), group, dist.ReduceOp.MAX)[..., None]
        ignored = target == ignore
        local = target - first
        mine = (local >= 0) & (local < vocabulary) & ~ignored
        index = torch.where(mine, local, 0)[..., None]
        at_target = shifted.gather(-1, index)[..., 0] * mine
        probs = shifted.exp()
        # One exchange: the sum of exponentials, the logit of the target, the sum of logits.
        sums = _reduce(torch.stack([probs.sum(-1), at_target, shifted.sum(-1)]), group)
        probs = probs / sums[0][..., None]
        loss = sums[0].log() - (1 - smoothing) * sums[1] - smoothing / total * sums[2]
        ctx.save_for_backward(probs, index, mine, ignored)
        ctx.smoothing, ctx.total, ctx.dtype = smoothing, total, logits.dtype
        return loss.masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probs, index, mine, ignored = ctx.saved_tensors
        out = probs - ctx.smoothing / ctx.total
        out = out.scatter_add(-1, index, -(1 - ctx.smoothing) * mine[..., None].to(out.dtype))
        out = out * grad.masked_fill(ignored, 0.0)[..., None]
        return out.to(ctx.dtype), None, None, None, None


def parallel_cross_entropy(
    inp: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    dist_process_group: ProcessGroup | None = None,
    ignore_idx: int = -100,
    is_cg_capturable: bool = False,
) -> torch.Tensor:
    """Cross entropy of each token.

    Args:
        inp: [..., V / ranks] logits, equal parts in order of rank. Unlike the kernel, they are not overwritten.
        target: [...] in [0, V).
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        reduce_loss: refused.
        dist_process_group: ranks the vocabulary is cut across; None for one.
        ignore_idx: target without loss and gradient.
        is_cg_capturable: without effect.

    Returns:
        [...] float32.

    Raises:
        ConfigError: the mean is asked for.
    """
    if reduce_loss:
        raise ConfigError("parallel_cross_entropy(reduce_loss=True): take the mean yourself; which tokens it counts differs by version.")
    return _CrossEntropy.apply(inp, target, label_smoothing, dist_process_group, ignore_idx)
