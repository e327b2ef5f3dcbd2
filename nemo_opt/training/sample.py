"""A greedy continuation of a few prompts, from a model at any layout: for a person to look at, not to measure by."""

from collections.abc import Sequence
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.errors import ConfigError
from nemo_opt.models.sizes import model_config_of
from nemo_opt.training.logits import gather_logits

__all__ = ["generate"]


def generate(chunks: list[Any], tokenizer: Tokenizer, prompts: Sequence[str], *, new_tokens: int = 16) -> list[str]:
    """The most likely continuation of each prompt, up to the end-of-document token; equal on every rank. Collective.

    Every token takes a pass over the whole text (there is no cache), which is right for a few tokens only.

    Args:
        chunks: this rank's chunks.
        tokenizer: the model's.
        prompts: texts to continue.
        new_tokens: tokens to add at most.

    Raises:
        ConfigError: a prompt is empty, or longer than the model allows.

    """
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    multiple = 2 * parallel_state.get_context_parallel_world_size() * parallel_state.get_tensor_model_parallel_world_size()
    longest = max(map(len, rows)) + new_tokens
    length, limit = -(-longest // multiple) * multiple, model_config_of(chunks).max_position_embeddings
    if not all(rows) or length > limit:
        raise ConfigError(f"prompts of {[len(row) for row in rows]} tokens and {new_tokens} more need 1..{limit} positions")
    starts, open_rows = [len(row) for row in rows], set(range(len(rows)))
    for _ in range(new_tokens):
        for index, token in enumerate(_next_tokens(chunks, rows, length)):
            if index in open_rows:
                rows[index].append(token)
        open_rows -= {index for index in open_rows if rows[index][-1] == tokenizer.eod}
        if not open_rows:
            break
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]


def _next_tokens(chunks: list[Any], rows: list[list[int]], length: int) -> list[int]:
    """Of each row, decided on rank 0. What follows a row's end is filled up, which causal attention hides."""
    tokens_BS = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    positions_BS = torch.arange(length).expand(len(rows), length)
    logits_BSV = gather_logits(chunks, {"tokens": tokens_BS, "position_ids": positions_BS})
    chosen = [[int(logits_BSV[i, len(row) - 1].argmax()) for i, row in enumerate(rows)]] if logits_BSV is not None else [[]]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]
