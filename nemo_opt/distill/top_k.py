"""The teacher's likeliest tokens, and both models' logits for them, over a vocabulary split between ranks.

ModelOpt's `TopKLogitsKLLoss` gathers the same candidates, but every rank then computes the whole loss and the backward pass of its gather
adds their gradients: at TP2 the gradient is twice too large. Here a rank takes back its own part only.
"""

from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist

__all__ = ["largest_logits"]


def largest_logits(
    student: torch.Tensor, teacher: torch.Tensor, k: int, *, vocab_size: int | None = None, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the k tokens that the teacher holds likeliest; in no order. Of equal logits any may be taken.

    Args:
        student: logits [..., V / ranks].
        teacher: logits of the same shape.
        k: at most vocab_size.
        vocab_size: tokens that count; the others pad the vocabulary. None: all.
        group: the ranks that share the vocabulary; None for one.

    Returns:
        The student's and the teacher's logits [..., k] in float32, the same on every rank. A gradient of the former reaches the rank that
        holds the token.

    """
    ranks = 1 if group is None else group.size()
    width = teacher.size(-1)
    teacher = teacher.detach()
    if vocab_size is not None and vocab_size < ranks * width:
        first = width * (0 if group is None else group.rank())
        is_padding = torch.arange(first, first + width, device=teacher.device) >= vocab_size
        teacher = teacher.masked_fill(is_padding, float("-inf"))
    values, indices = teacher.topk(min(k, width), dim=-1, sorted=False)
    own, values = student.gather(-1, indices).float(), values.float()
    if ranks > 1:
        own, values = _Gather.apply(own, values, group)  # type: ignore[no-untyped-call]
        values, indices = values.topk(k, dim=-1, sorted=False)
        own = own.gather(-1, indices)
    return own, values


class _Gather(torch.autograd.Function):
    """Joins the ranks' parts of two tensors along the last dim, in one message; the first one is differentiable.

    Each rank computes the same of the whole, so its gradient needs no sum.
    """

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, second: torch.Tensor, group: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        ctx.group, ctx.width = group, first.size(-1)
        parts = first.new_empty(group.size(), 2, *first.shape)
        dist.all_gather(list(parts), torch.stack([first, second]), group=group)
        joined = [parts[:, index].movedim(0, -2).flatten(-2) for index in range(2)]
        ctx.mark_non_differentiable(joined[1])
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return grad_outputs[0].narrow(-1, ctx.group.rank() * ctx.width, ctx.width), None, None
