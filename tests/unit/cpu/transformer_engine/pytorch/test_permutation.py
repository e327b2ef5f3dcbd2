"""Sorting tokens by expert against Megatron-Core's unfused functions."""

import nemo_opt._stack

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs, unpermute

from nemo_opt.cpu.transformer_engine.pytorch.permutation import moe_permute
from nemo_opt.errors import ConfigError


def _case():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 4, generator=generator).requires_grad_()
    routing = torch.zeros(6, 3, dtype=torch.bool).scatter(1, torch.randn(6, 3, generator=generator).topk(2).indices, True)
    return tokens, routing, (torch.rand(6, 3, generator=generator) * routing).requires_grad_()


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_there_and_back(with_probs, merge):
    tokens, routing, probs = _case()
    results = []
    for fused in (False, True):
        rows, row_probs, order, *_ = permute(tokens, routing, probs=probs if with_probs else None, num_out_tokens=12, fused=fused)
        back = unpermute(rows.sin(), order, tokens.shape, probs=probs if merge else None, routing_map=routing, fused=fused)
        loss = back.square().sum() + (row_probs.cos().sum() if with_probs else 0)
        results.append((rows, row_probs, back, torch.autograd.grad(loss, (tokens, probs), allow_unused=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("with_probs", [False, True])
def test_chunks(with_probs):
    tokens, _, probs = _case()
    sizes, order = torch.tensor([1, 3, 2]), torch.tensor([2, 0, 1])
    args = (tokens, sizes, order, probs[:, 0] if with_probs else None)
    torch.testing.assert_close(sort_chunks_by_idxs(*args, fused=True), sort_chunks_by_idxs(*args, fused=False))


def test_refusals():
    tokens, routing, _ = _case()
    with pytest.raises(ConfigError, match="map_type"):
        moe_permute(tokens, routing, 12, map_type="index")
    with pytest.raises(ConfigError, match="12 entries"):
        moe_permute(tokens, routing, 11)
