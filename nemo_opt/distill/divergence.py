"""Divergences between the student's and the teacher's next-token distributions, fused, over a vocabulary split between ranks.

With p the teacher's and q the student's softmax at temperature T, for each token:

- "forward_kl": KL(p || q) = sum p log(p / q), the loss of Hinton et al. (arXiv 1503.02531); ModelOpt's `LogitsKLLoss`;
- "reverse_kl": KL(q || p), which seeks a mode (MiniLLM, arXiv 2306.08543); ModelOpt's `LogitsKLLoss(reverse=True)`;
- "jensen_shannon": (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

Decisions:
- One autograd function over blocks of rows that stay in the cache: no full-size float32 copy of either input, whatever their type. Beside
  the inputs the gradient is allocated, and not even that where it may be written over the teacher's logits.
- The gradient is computed in the forward pass, while the block is at hand: what follows contributes one factor a token.
- Ranks tell each other five numbers a token, gathered once (Jensen-Shannon: and two more, added once). The backward pass tells nothing.
"""

import math
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist

from nemo_opt.distill.config import LOGIT_LOSSES
from nemo_opt.errors import ConfigError

__all__ = ["divergence"]

_SHARE = 27
"""The three float32 buffers of a block are this part of one input, 3.7 %, where the limits allow it."""
_BLOCK = {"cpu": (1 << 16, 1 << 18), "cuda": (1 << 20, 1 << 24)}
"""Least and most logits of a block.

On CPUs what stays in the caches (measured on 2 cores): of 2048 rows of 32000, 2^19 took as long as 2^18, 2^17 and 2^20 10 % longer; of 4096
and 8192, 2^17 and 2^16 took 9 to 19 % longer. On GPUs, not measured, what takes a kernel as long as its launch, some 4 us: 2^20 float32
are 4 MB, at 3 TB/s 3 us there and back.
"""
_LN2 = math.log(2.0)


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Any = None,
    overwrite_teacher: bool = False,
    finite: torch.Tensor | None = None,
) -> torch.Tensor:
    """The divergence of each token; differentiable once, by the student's logits.

    Args:
        student: logits [..., V / ranks], float32, bfloat16 or float16.
        teacher: logits of the same shape.
        kind: one of `LOGIT_LOSSES`.
        temperature: T; both logits are divided by it. The result is not multiplied by its square.
        vocab_size: tokens that count; the others pad the vocabulary. None: all.
        group: the ranks that share the vocabulary; None for one.
        overwrite_teacher: write the gradient over the teacher's logits, where the types agree. They must be of no further use.
        finite: bool [2]; set to False where this rank finds a logit of the student (first) or of the teacher that is no finite number. What
            is negative infinity beside finite logits passes: a probability of 0.

    Returns:
        float32 [...], in nats, the same on every rank of the group.

    Raises:
        ConfigError: unknown kind, or shapes that differ.

    """
    if kind not in LOGIT_LOSSES:
        raise ConfigError(f"unknown divergence {kind!r}; known are {list(LOGIT_LOSSES)}")
    if student.shape != teacher.shape:
        raise ConfigError(
            f"logits of the student are {list(student.shape)}, of the teacher {list(teacher.shape)}: "
            "give both models one vocabulary, sequence length, micro-batch and layout"
        )
    group = group if group is not None and group.size() > 1 else None
    first = student.size(-1) * (group.rank() if group is not None else 0)
    columns = student.size(-1) if vocab_size is None else min(max(vocab_size - first, 0), student.size(-1))
    losses = _Divergence.apply(student, teacher.detach(), kind, temperature, columns, group, overwrite_teacher, finite)  # type: ignore[no-untyped-call]
    assert isinstance(losses, torch.Tensor)
    return losses


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        kind: str,
        temperature: float,
        columns: int,
        group: Any,
        overwrite_teacher: bool,
        finite: torch.Tensor | None,
    ) -> torch.Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            overwrites = overwrite_teacher and teacher.dtype == student.dtype
            gradient = (teacher if overwrites else torch.empty_like(student)).view(-1, student.size(-1))
        student_rows, teacher_rows = (logits.reshape(-1, logits.size(-1))[:, :columns] for logits in (student, teacher))
        losses, own = _run(student_rows, teacher_rows, _Block(kind, 1.0 / temperature, student_rows), group, gradient)
        if finite is not None:
            finite &= torch.isfinite(own[[1, 3]]).all(-1)
        ctx.gradient = gradient
        return losses.view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the divergence was differentiated before, which scaled its gradient in place: compute it anew")
        (grad_losses,) = grad_outputs
        factors = grad_losses.reshape(-1, 1)
        unused = factors == 0
        any_unused = gradient.is_cuda or bool(unused.any())  # to ask would make a GPU wait
        for rows in _blocks(gradient):
            scaled = gradient[rows].mul_(factors[rows])
            if any_unused:  # masked tokens: their logits may hold anything, and 0 * NaN is NaN
                scaled.masked_fill_(unused[rows], 0.0)
        return gradient.view(*grad_losses.shape, -1), *[None] * 7


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Rows of [rows, columns] that are taken together."""
    rows, columns = logits.shape
    least, most = _BLOCK["cuda" if logits.is_cuda else "cpu"]
    wanted = rows * columns * logits.element_size() // (_SHARE * 3 * 4)
    size = max(1, min(max(wanted, least), most) // max(columns, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _run(
    student: torch.Tensor, teacher: torch.Tensor, block: "_Block", group: Any, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergences [rows] of logits [rows, columns], and this rank's sums; writes the student's gradient where one is wanted."""
    blocks = _blocks(student)
    own = torch.empty(5, len(student), dtype=torch.float32, device=student.device)
    losses = torch.empty_like(own[0])

    def finish(rows: slice, sums: torch.Tensor, shares: torch.Tensor | None) -> None:
        block.normalise(own[:, rows], sums[:, rows])
        own_shares = block.shares()
        losses[rows] = block.losses(own_shares if shares is None else shares[:, rows])
        if gradient is not None:
            block.write_gradient(gradient[rows])

    if group is None:
        for rows in blocks:
            block.load(student[rows], teacher[rows], own[:, rows])
            finish(rows, own, None)
        return losses, own

    for rows in blocks:
        block.load(student[rows], teacher[rows], own[:, rows])
    sums = block.combine(own, group)
    shares = torch.zeros_like(own[:2])
    if block.kind == "jensen_shannon":
        for rows in blocks:
            block.load(student[rows], teacher[rows], own[:, rows])
            block.normalise(own[:, rows], sums[:, rows])
            shares[:, rows] = block.shares()
        dist.all_reduce(shares, group=group)
    for rows in blocks:
        block.load(student[rows], teacher[rows], own[:, rows])
        finish(rows, sums, shares)
    return losses, own


class _Block:
    """Some rows of logits and what is computed of them, in float32, in buffers that are used again for the next rows.

    `sums` [5, rows] are the student's largest logit and sum of exponentials, the teacher's, and the sum that the divergence is made of:
    of p (zt - zs), of q (zs - zt), or nothing; exponentials are relative to the largest logit.
    """

    def __init__(self, kind: str, scale: float, student: torch.Tensor) -> None:
        self.kind, self.scale = kind, scale
        largest = max((rows.stop - rows.start for rows in _blocks(student)), default=0)
        self._buffers = [torch.empty(largest, student.size(1), dtype=torch.float32, device=student.device) for _ in range(3)]

    def load(self, student: torch.Tensor, teacher: torch.Tensor, sums: torch.Tensor) -> None:
        """Exponentials, difference and own `sums` of the rows, whose logits are read only here."""
        self.q, self.p, self.difference = (buffer[: len(student)] for buffer in self._buffers)
        if not student.size(1):  # this rank has padding only
            sums[:] = sums.new_tensor([-math.inf, 0.0, -math.inf, 0.0, 0.0])[:, None]
            return
        zs, zt = self._scaled(student, self.q), self._scaled(teacher, self.p)
        torch.sub(zt, zs, out=self.difference)
        for logits, exponentials, largest, total in ((zs, self.q, sums[0], sums[1]), (zt, self.p, sums[2], sums[3])):
            torch.amax(logits, -1, out=largest)
            torch.sub(logits, largest[:, None], out=exponentials).exp_()
            torch.sum(exponentials, -1, out=total)
        if self.kind == "forward_kl":  # whose gradient needs no difference
            torch.sum(self.difference.mul_(self.p), -1, out=sums[4])
        elif self.kind == "reverse_kl":  # whose gradient needs no p
            torch.sum(torch.mul(self.q, self.difference, out=self.p), -1, out=sums[4]).neg_()

    def combine(self, own: torch.Tensor, group: Any) -> torch.Tensor:
        """The `sums` over the whole vocabulary."""
        parts = own.new_empty(group.size(), *own.shape)
        dist.all_gather(list(parts), own, group=group)
        sums = parts.amax(0)  # the two maxima are right so; the rest follows
        weight_s, weight_t = torch.exp(parts[:, 0] - sums[0]), torch.exp(parts[:, 2] - sums[2])
        sums[1] = (parts[:, 1] * weight_s).sum(0)
        sums[3] = (parts[:, 3] * weight_t).sum(0)
        sums[4] = (parts[:, 4] * (weight_t if self.kind == "forward_kl" else weight_s)).sum(0)
        return sums

    def normalise(self, own: torch.Tensor, sums: torch.Tensor) -> None:
        """Probabilities of the loaded rows, given the `sums` of this rank (they were computed with) and of the whole vocabulary."""
        self.q.mul_((torch.exp(own[0] - sums[0]) / sums[1])[:, None])
        if self.kind != "reverse_kl":
            self.p.mul_((torch.exp(own[2] - sums[2]) / sums[3])[:, None])
        self._offset = (sums[0] - sums[2]) + torch.log(sums[1] / sums[3])  # log(p / q) = difference + offset
        self._expected = sums[4] / (sums[3] if self.kind == "forward_kl" else sums[1])

    def shares(self) -> torch.Tensor:
        """Jensen-Shannon: this rank's shares [2, rows] of KL(q || m) and KL(p || m). Leaves log(q / m) in `difference`."""
        if self.kind != "jensen_shannon":
            return self._offset.new_zeros(2, 1)
        log_pq = self.difference.add_(self._offset[:, None])
        log_pm = torch.nn.functional.softplus(-log_pq).neg_().add_(_LN2)
        # Not log_pm - log_pq: where q is much larger than p both are large and nearly equal.
        log_qm = self.difference.copy_(torch.nn.functional.softplus(log_pq).neg_().add_(_LN2))
        return torch.stack([(self.q * log_qm).sum(-1), log_pm.mul_(self.p).sum(-1)])

    def losses(self, shares: torch.Tensor) -> torch.Tensor:
        """The divergences [rows]."""
        if self.kind == "jensen_shannon":
            self._expected = shares[0]
            return shares.mean(0)
        return self._expected + (self._offset if self.kind == "forward_kl" else -self._offset)

    def write_gradient(self, into: torch.Tensor) -> None:
        """Derivative by the student's logits."""
        columns = self.q.size(1)
        into, padding = into[:, :columns], into[:, columns:]
        padding.zero_()
        if self.kind == "forward_kl":  # q - p
            torch.sub(self.q, self.p, out=into)
        elif self.kind == "reverse_kl":  # q (log(q / p) - KL)
            torch.mul(self.q, self.difference.add_(self._expected[:, None]).neg_(), out=into)
        else:  # q (log(q / m) - KL(q || m)) / 2
            torch.mul(self.q, self.difference.sub_(self._expected[:, None]).mul_(0.5), out=into)
        if self.scale != 1.0:
            into.mul_(self.scale)

    def _scaled(self, logits: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        if self.scale == 1.0 and logits.dtype == torch.float32:
            return logits
        return buffer.copy_(logits).mul_(self.scale)
