"""Loss functions in the form of Megatron-Core's schedules.

A loss function is called as `loss_fn(model, batch)` in the forward step and returns what the schedule calls on the last stage's output:
`(loss, num_tokens, metrics)`, where loss is the *sum* over this rank's valid tokens. Nothing is averaged here: the gradients of all
micro-batches, data and context parallel ranks are added, then divided once by the number of valid tokens of the global batch
(`calculate_per_token_loss`). So the result is the mean over tokens, exactly, however tokens are spread over ranks and micro-batches.
Each metric is a pair [sum, count] for the same reason.
"""

from collections.abc import Callable
from typing import Any

import nemo_opt._stack

import torch

__all__ = ["Batch", "LossFunction", "Metrics", "language_model_loss", "masked_sum"]

type Batch = dict[str, torch.Tensor | None]
"""tokens, labels, loss_mask and position_ids of shape [B, S]; attention_mask is None."""
type Metrics = dict[str, torch.Tensor]
"""Pairs [sum, count] by name; `MegatronStep` adds them over micro-batches and ranks and divides."""
type LossFunction = Callable[[Any, Batch], Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Metrics]]]


def language_model_loss(model: Any, batch: Batch) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Metrics]]:
    """Cross-entropy (nats) of the labels, summed over the tokens that loss_mask keeps."""
    del model
    loss_mask = batch["loss_mask"]
    assert loss_mask is not None

    def reduce(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        total, count = masked_sum(output, loss_mask)
        return total, count.to(torch.int), {"loss": torch.stack([total.detach(), count])}

    return reduce


def masked_sum(losses: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses [B, S] weighted by the mask, and the sum of the mask; both float32 scalars. The mask may be flat."""
    mask = loss_mask.reshape(losses.shape).float()
    # A masked position may hold anything, and 0 * NaN is NaN.
    kept = torch.where(mask > 0, losses.float() * mask, 0.0)
    return kept.sum(), mask.sum()
