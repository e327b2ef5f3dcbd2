"""Measuring on one rank in this process: what is counted and added up, and what the model is like before and after."""

from unittest.mock import patch

import nemo_opt._stack

import pytest
import torch

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune.activations import LayerActivations
from nemo_opt.prune.importance import _whole_experts, measure_importance
from nemo_opt.prune.selection import keep_layers
from nemo_opt.prune.slicing import check_weights, slice_model
from nemo_opt.testing import pruning as testing
from nemo_opt.training.forward import forward_loop

SMALL = preset(
    "tiny", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
SUMS_TOLERANCE = 1e-12
"""Relative; float64 sums in another order."""


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


def loop(shown):
    return forward_loop(shown, description="test")


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("experts", [None, 3])
def test_micro_batches_add_up(one_rank, spec, experts):
    (model,) = testing.contrasted_model(one_rank, SMALL.with_(num_moe_experts=experts), spec)
    shown = testing.batches(count=2)
    both, one, two = (measure_importance(model, loop(part)) for part in (shown, shown[:1], shown[1:]))
    assert (both.tokens, one.tokens, two.tokens) == (64, 32, 32), "2 sequences of 16 in each micro-batch"
    assert torch.allclose(both.layers, one.layers + two.layers, rtol=SUMS_TOLERANCE)
    for name in ("heads", "groups"):
        ours, first, second = (getattr(scores, name) for scores in (both, one, two))
        for number in (1, 2):
            assert torch.allclose(ours[number].square(), first[number].square() + second[number].square(), rtol=SUMS_TOLERANCE)
    for number, heads in both.heads.items():
        assert torch.allclose(both.groups[number], heads.view(2, -1).norm(dim=1), rtol=SUMS_TOLERANCE)
    tensors = [both.hidden, both.layers, *(t for name in ("ffn", "heads", "groups", "experts") for t in getattr(both, name).values())]
    assert all(tensor.dtype == torch.float64 and bool((tensor > 0).all()) for tensor in tensors)
    assert (both.model, list(both.ffn)) == (SMALL.with_(num_moe_experts=experts), [1, 2])
    assert [tuple(t.shape) for t in both.ffn.values()] == [(24,) if experts is None else (3, 24)] * 2
    assert list(both.experts) == ([] if experts is None else [1, 2])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_shown_data_in_evaluation_mode_and_left_as_it_was(one_rank, training):
    (model,) = testing.contrasted_model(one_rank, SMALL, "local")
    model.train(training)
    seen = []

    def look(shown_to):
        assert shown_to is model
        seen.append((model.training, torch.is_grad_enabled()))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_importance([model], look)
    assert seen == [(False, False)]
    assert model.training == model.decoder.layers[0].training == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loop_that_shows_nothing_is_refused(one_rank):
    chunks = testing.contrasted_model(one_rank, SMALL, "local")
    with pytest.raises(DataError, match=r"^layers \[1, 2\] have seen no data: the forward loop must run .* on every rank$"):
        measure_importance(chunks, lambda _: None)


def test_layers_of_other_ranks_that_saw_nothing_are_named(one_rank):
    chunks = testing.contrasted_model(one_rank, SMALL, "local")

    def gather(everyone, mine):
        assert (everyone, mine) == ([None] * 3, [])
        everyone[:] = [[8], mine, [1, 8]]

    data = loop(testing.batches(count=1))
    with (
        patch("nemo_opt.prune.importance.weights_digest"),
        patch("nemo_opt.prune.importance.dist.get_world_size", return_value=3),
        patch("nemo_opt.prune.importance.dist.all_gather_object", gather),
        pytest.raises(DataError, match=r"layers \[1, 8\] have seen no data"),
    ):
        measure_importance(chunks, data)


def test_all_ranks_take_the_first_ones_scores(one_rank):
    chunks = testing.contrasted_model(one_rank, SMALL, "local")

    def broadcast(holder, *, src):
        assert (holder[0].model, src) == (SMALL, 0)
        holder[0] = "the first one's"

    with patch("nemo_opt.prune.importance.dist.broadcast_object_list", broadcast):
        assert measure_importance(chunks, loop(testing.batches(count=1))) == "the first one's"


def test_experts_scores_are_means_over_their_tokens(one_rank):
    record = LayerActivations()
    record.expert_tokens = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    record.experts = torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64)
    record.ffn = torch.tensor([[5.0, 6.0], [0.0, 0.0], [8.0, 2.0]], dtype=torch.float64)
    scores = _whole_experts(record)
    assert scores["experts"].tolist() == [3.0, 0.0, 0.5]
    assert scores["ffn"].tolist() == [[5.0, 6.0], [0.0, 0.0], [2.0, 0.5]]


def test_an_expert_without_tokens_scores_zero(one_rank):
    (model,) = testing.contrasted_model(one_rank, SMALL.with_(num_moe_experts=4, num_layers=1), "local")
    router = model.decoder.layers[0].mlp.router
    with torch.no_grad():
        router.weight.zero_()  # of equal chances the first ones are taken
        router.weight[2:].fill_(-1e3)
    model.decoder.layers[0].pre_mlp_layernorm.register_forward_hook(lambda _module, _args, output: output.abs())
    scores = measure_importance(model, loop(testing.batches(count=1)))
    assert [bool(score) for score in scores.experts[1]] == [True, True, False, False]
    assert [bool(row.any()) for row in scores.ffn[1]] == [True, True, False, False]


def test_a_weight_that_pruning_does_not_know_is_refused_by_name(one_rank):
    (model,) = testing.contrasted_model(one_rank, SMALL, "local")
    check_weights(model)
    model.decoder.add_module("extra", torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(ConfigError, match=r"^decoder\.extra\.weight is no weight that pruning knows \(.*\): this model cannot be pruned$"):
        check_weights(model)


def test_slicing_keeps_training_mode_hooks_and_settings_of_parameters(one_rank):
    (model,) = testing.contrasted_model(one_rank, SMALL, "local")
    weight = model.decoder.layers[1].mlp.linear_fc2.weight
    weight.requires_grad_(False)
    weight.mark, weight.amount, weight.note, weight.other = True, 0.5, "kept", object()
    model.eval()
    before = dict(model.named_parameters())
    slice_model(model, keep_layers(SMALL, [1]))
    after = dict(model.named_parameters())
    sliced = after["decoder.layers.0.mlp.linear_fc2.weight"]
    assert (sliced.mark, sliced.amount, sliced.note, hasattr(sliced, "other")) == (True, 0.5, "kept", False)
    assert [name for name, p in after.items() if not p.requires_grad] == ["decoder.layers.0.mlp.linear_fc2.weight"]
    assert not any(module.training for module in model.modules())
    for name, parameter in after.items():
        assert parameter is not before.get(name)
        assert torch.equal(parameter, before[name.replace("layers.0", "layers.1")])
