"""Initial weights that are a function of (seed, global name, global position) alone.

Megatron-Core draws weights from each rank's random stream, so two layouts, or the local and the TE spec, start from different models
and no number of one can be compared with the other's. Here the rows of every global weight are drawn in blocks of fixed height, each
from a generator seeded by (seed, key, block); a rank draws the blocks that it needs and keeps its part. Draws are made on the CPU, so
that a GPU starts from the same weights too.

Scale as in Megatron: normal(0, init_method_std), the two projections back into the residual stream by 1/sqrt(2 * num_layers) of that,
norms one. The rows that pad the vocabulary are zero: no token selects them, so as input they never matter, and as output their logit is
zero until training, where a random row would only add noise to the softmax.
"""

import hashlib
import math
from collections.abc import Sequence

import nemo_opt._stack

import torch

from nemo_opt.models.shards import Shard, parameter_shards
from nemo_opt.models.sizes import model_config_of

__all__ = ["clear_vocabulary", "seeded_init"]

_BLOCK_ROWS = 256
_RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def seeded_init(chunks: Sequence[torch.nn.Module], seed: int) -> None:
    """Fills the parameters of this rank's chunks, in place. Memory: one block of `_BLOCK_ROWS` rows."""
    config = model_config_of(chunks)
    shards = parameter_shards(chunks)
    for shard in shards:
        _fill(shard, seed, _std(shard.key, config.init_method_std, config.num_layers))
    clear_vocabulary(shards, config.vocab_size)


@torch.no_grad()
def clear_vocabulary(shards: Sequence[Shard], first: int) -> None:
    """Zeroes the rows of the embedding and the output head from token `first` on, in place."""
    for shard in shards:
        if shard.key in _VOCABULARY:
            shard.tensor[max(0, first - shard.offset[0]) :].zero_()


def _fill(shard: Shard, seed: int, std: float | None) -> None:
    if std is None:
        shard.tensor.fill_(1.0)
        return
    rows, columns = shard.index[0], shard.index[1:]
    row = rows.start
    while row < rows.stop:
        block = row // _BLOCK_ROWS
        first = block * _BLOCK_ROWS
        stop = min(rows.stop, first + _BLOCK_ROWS)
        drawn = _draw(shard, seed, block, std)[row - first : stop - first][(slice(None), *columns)]
        shard.tensor[row - rows.start : stop - rows.start] = drawn.to(shard.tensor)
        row = stop


def _draw(shard: Shard, seed: int, block: int, std: float) -> torch.Tensor:
    rows = min(_BLOCK_ROWS, shard.global_shape[0] - block * _BLOCK_ROWS)
    digest = hashlib.sha256(f"{seed}/{shard.key}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(rows, *shard.global_shape[1:]).normal_(0.0, std, generator=generator)


def _std(key: str, std: float, num_layers: int) -> float | None:
    """None for norms, which start at one."""
    if "norm" in key:
        return None
    return std / math.sqrt(2 * num_layers) if key.endswith(_RESIDUAL_PROJECTIONS) else std
