"""What is summed over ranks that share a sequence, on one rank whose partner is made up: it has seen the same positions again."""

from unittest.mock import patch

import nemo_opt._stack

import pytest
import torch
import torch.distributed as dist

from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune import importance
from nemo_opt.prune.activations import LayerActivations, recorded_layers
from nemo_opt.testing import pruning as testing

SMALL = preset(
    "tiny", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
TOLERANCE = 1e-12
"""Relative; float64 sums, doubled and halved."""
GROUPS = "nemo_opt.prune.activations.parallel_state.get_{}_group"


class Pair:
    """A group of this rank and one that holds the same numbers."""

    def size(self):
        return 2


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture
def doubled():
    """Sums over a `Pair` are twice this rank's; counts them."""
    real, calls = dist.all_reduce, []

    def all_reduce(tensor, *args, group=None, **kwargs):
        if isinstance(group, Pair):
            calls.append(tensor.shape)
            tensor.mul_(2)
        else:
            real(tensor, *args, group=group, **kwargs)

    with patch("torch.distributed.all_reduce", all_reduce):
        yield calls


def recorded(model, *shared):
    """The records of one micro-batch, with each of the groups `shared` being a pair."""
    patches = [patch(GROUPS.format(name), return_value=Pair()) for name in shared]
    for one in patches:
        one.start()
    with recorded_layers(model) as records:  # the hooks ask for their groups here
        for one in patches:
            one.stop()
        testing.logits([model], testing.batches(count=1))
    return records


def same(ours, theirs):
    return torch.allclose(ours, theirs, rtol=TOLERANCE)


@pytest.mark.parametrize("spec", ["local", "te"])
def test_means_are_those_of_the_whole_sequence(one_rank, doubled, spec):
    (model,) = testing.contrasted_model(one_rank, SMALL, spec)
    alone, shared = recorded(model), recorded(model, "context_parallel")
    assert doubled
    for number in (1, 2):
        ours, theirs = shared[number], alone[number]
        assert all(same(a, b) for a, b in zip(ours.norms, theirs.norms, strict=True))
        assert same(ours.heads, theirs.heads)
        assert same(ours.ffn, theirs.ffn)
        assert same(ours.influence, theirs.influence)
        assert (ours.tokens, theirs.tokens) == (64, 32)


def test_sequence_parallel_ranks_share_it_between_the_regions_only(one_rank, doubled):
    (model,) = testing.contrasted_model(one_rank, SMALL, "local")
    alone = recorded(model)
    assert not doubled
    with patch.object(model.config, "sequence_parallel", True), patch(GROUPS.format("tensor_and_context_parallel"), return_value=Pair()):
        hooks = recorded_layers(model)
        shared = hooks.__enter__()
    testing.logits([model], testing.batches(count=1))
    hooks.__exit__(None, None, None)
    assert [len(shape) for shape in doubled] == [2, 2, 0] * 2, "of each layer two norms [B, H] and the influence"
    assert shared[1].tokens == 2 * alone[1].tokens
    assert same(shared[2].influence, alone[2].influence)
    assert same(shared[2].norms[1], alone[2].norms[1])


def test_outputs_of_experts_are_added_before_their_norm(one_rank, doubled):
    (model,) = testing.contrasted_model(one_rank, SMALL.with_(num_moe_experts=3), "te")
    outputs = []
    model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    alone, shared = recorded(model), recorded(model, "expert_tensor_parallel")
    assert torch.equal(*outputs), "what is summed is a copy"
    assert same(shared[1].experts, 2 * alone[1].experts)
    assert same(shared[1].expert_tokens, alone[1].expert_tokens)
    assert float(alone[1].expert_tokens.sum()) == 2 * 32, "each token is routed to two"
    assert same(shared[1].ffn, alone[1].ffn)


def test_sums_over_data_parallel_ranks_leave_the_records_alone(doubled):
    record = torch.tensor([1.0, 2.0])
    assert importance._sum_over(record, Pair()).tolist() == [2.0, 4.0]
    assert record.tolist() == [1.0, 2.0]


@pytest.fixture
def opposites():
    """The other rank of a `Pair` holds this one's numbers with the sign turned."""

    def all_gather(parts, tensor, *, group):
        assert isinstance(group, Pair)
        parts[0].copy_(tensor)
        parts[1].copy_(-tensor)

    with patch("torch.distributed.all_gather", all_gather):
        yield


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_ranks_are_put_side_by_side(opposites, dim):
    part = torch.tensor([[1.0, 2.0]])
    assert torch.equal(importance._side_by_side(part, Pair(), dim=dim), torch.cat([part, -part], dim=dim))
    assert importance._side_by_side(part[0], Pair()).tolist() == [1, 2, -1, -2]


@pytest.mark.parametrize(
    ("shared", "ffn", "experts"),
    [
        ("expert_tensor_parallel", [[4, 6, -4, -6], [1, 3, -1, -3]], [1, 2]),
        ("expert_model_parallel", [[4, 6], [1, 3], [-4, -6], [-1, -3]], [1, 2, -1, -2]),
    ],
)
def test_ranks_share_the_channels_of_experts_or_the_experts(one_rank, opposites, shared, ffn, experts):
    record = LayerActivations()
    record.expert_tokens, record.experts = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    record.ffn = torch.tensor([[4.0, 6.0], [2.0, 6.0]])
    with patch(GROUPS.format(shared), return_value=Pair()):
        scores = importance._whole_experts(record)
    assert (scores["ffn"].tolist(), scores["experts"].tolist()) == (ffn, experts)
