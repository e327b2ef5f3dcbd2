"""The digest against its definition, written out element by element: files of scores name weights by it, so it must never change."""

import hashlib
from unittest.mock import patch

import nemo_opt._stack

import pytest
import torch

from nemo_opt.models.shards import Shard
from nemo_opt.prune.digest import weights_digest

A, B = 0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D
INTEGERS = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def shard(key, tensor, offset=(0, 0), shape=None):
    return Shard(key=key, tensor=tensor, offset=offset, global_shape=shape or tuple(tensor.shape))


def digest(*ranks):
    """Of the shards that each rank holds; every rank must come to the same."""
    held = []

    def gather(everyone, mine):
        assert everyone == [None] * len(ranks)
        held.append(mine)
        everyone[:] = [*held, *[{}] * (len(ranks) - len(held))]

    with (
        patch("nemo_opt.prune.digest.dist.get_world_size", return_value=len(ranks)),
        patch("nemo_opt.prune.digest.dist.all_gather_object", gather),
        patch("nemo_opt.prune.digest.parameter_shards", side_effect=lambda chunks: chunks[0]),
    ):
        return [weights_digest(shards) for shards in ranks][-1]  # the last one has heard of all


def by_definition(**weights):
    sums = {}
    for key, tensor in weights.items():
        bits = tensor.view(INTEGERS[tensor.dtype]).view(tensor.shape[0], -1).tolist()
        sums[key] = sum(((r + 1) * A | 1) * ((c + 1) * B | 1) * value for r, row in enumerate(bits) for c, value in enumerate(row)) % 2**64
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_digest_is_its_definition(dtype):
    weight, norm = numbers(5, 3, dtype=dtype), numbers(4, dtype=dtype)
    assert digest([shard("weight", weight), shard("norm", norm, (0,))]) == by_definition(weight=weight, norm=norm)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2049])
def test_many_rows_are_added_in_parts(rows):
    weight = numbers(rows, 2)
    assert digest([shard("weight", weight)]) == by_definition(weight=weight)


def test_pieces_and_replicas_of_a_weight_give_its_digest():
    weight, norm = numbers(6, 8), numbers(6)
    whole = by_definition(weight=weight, norm=norm)
    norms = [shard("norm", norm, (0,))]
    rows = [[shard("weight", weight[:4], (0, 0)), *norms], [shard("weight", weight[4:], (4, 0)), *norms]]
    columns = [[shard("weight", weight[:, :3], (0, 0)), *norms], [shard("weight", weight[:, 3:], (0, 3)), *norms]]
    halves = [[shard("weight", weight, (0, 0)), shard("norm", norm[:2], (0,)), shard("norm", norm[2:], (2,))]] * 2
    assert digest(*rows) == digest(*columns) == digest(*halves) == whole


def test_the_order_of_weights_is_that_of_their_names():
    one, two = numbers(2, 2), numbers(3, 2)
    assert digest([shard("b", one), shard("a", two)]) == digest([shard("a", two)], [shard("b", one)]) == by_definition(a=two, b=one)


def test_names_are_told_apart():
    weight = numbers(2, 2)
    assert digest([shard("a", weight)]) != digest([shard("b", weight)])
