"""Choosing what stays, by scores made up here; no model."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.models.config import preset
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.selection import keep_layers, select

MODEL = preset(
    "tiny", num_layers=3, hidden_size=8, ffn_hidden_size=6, num_attention_heads=6, num_query_groups=3, kv_channels=2, vocab_size=128
)


def _scores(model=MODEL, **changes):
    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).abs()

    generator = torch.Generator().manual_seed(1)
    layers, heads = range(1, model.num_layers + 1), {}
    for number in layers:
        heads[number] = numbers(model.num_attention_heads)
    experts = model.num_moe_experts
    fields = {
        "hidden": numbers(model.hidden_size),
        "ffn": {n: numbers(*((experts,) if experts else ()), model.ffn_hidden_size) for n in layers},
        "heads": heads,
        "groups": {n: heads[n].view(model.num_query_groups, -1).norm(dim=1) for n in layers},
        "experts": {n: numbers(experts) for n in layers} if experts else {},
        "layers": numbers(model.num_layers),
        "model": model,
        "tokens": 1,
        "digest": "",
    }
    return ImportanceScores(**(fields | changes))


def test_everything_stays_without_targets():
    kept = select(_scores(), {})
    whole = keep_layers(MODEL, [])
    assert kept.hidden == whole.hidden == range(8)
    assert list(kept.layers) == list(whole.layers) == [1, 2, 3]
    for layer, same in zip(kept.layers.values(), whole.layers.values(), strict=True):
        assert layer.heads == list(same.heads)
        assert (layer.groups, layer.ffn, layer.experts) == (same.groups, same.ffn, None)


def test_the_highest_scores_stay_in_their_order():
    scores = _scores(
        hidden=torch.tensor([0.1, 5.0, 0.2, 4.0, 0.3, 3.0, 0.4, 2.0]),
        layers=torch.tensor([1.0, 0.5, 2.0]),
        ffn=dict.fromkeys((1, 2, 3), torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0])),
    )
    kept = select(scores, {"hidden_size": 3, "num_layers": 2, "ffn_hidden_size": 2})
    assert kept.hidden == [1, 3, 5]
    assert list(kept.layers) == [1, 3]
    assert [list(layer.ffn[0]) for layer in kept.layers.values()] == [[1, 3], [1, 3]]
    assert kept.layers[1].heads == list(range(6))
    assert kept.layers[1].experts is None


def test_heads_are_chosen_inside_their_groups_and_layers():
    heads = {1: torch.tensor([9.0, 8.0, 1.0, 2.0, 4.0, 3.0]), 2: torch.arange(6.0), 3: -torch.arange(6.0)}
    kept = select(_scores(heads=heads), {"num_attention_heads": 3})
    assert [layer.heads for layer in kept.layers.values()] == [[0, 3, 4], [1, 3, 5], [0, 2, 4]]
    assert all(layer.groups == range(3) for layer in kept.layers.values())


@pytest.mark.parametrize(("heads", "expected"), [(None, [0, 1, 4, 5]), (4, [0, 1, 4, 5]), (2, [0, 5])])
def test_groups_go_before_heads(heads, expected):
    scores = _scores(
        heads=dict.fromkeys((1, 2, 3), torch.tensor([2.0, 1.0, 9.0, 9.0, 0.0, 3.0])),
        groups=dict.fromkeys((1, 2, 3), torch.tensor([2.0, 1.0, 3.0])),
    )
    kept = select(scores, {"num_query_groups": 2} | ({"num_attention_heads": heads} if heads else {}))
    assert [(list(layer.groups), layer.heads) for layer in kept.layers.values()] == [([0, 2], expected)] * 3


def test_of_equal_scores_the_lower_index_stays():
    equal = {
        "hidden": torch.ones(8),
        "layers": torch.ones(3),
        "ffn": dict.fromkeys((1, 2, 3), torch.ones(6)),
        "heads": dict.fromkeys((1, 2, 3), torch.ones(6)),
        "groups": dict.fromkeys((1, 2, 3), torch.ones(3)),
    }
    targets = {"hidden_size": 5, "num_layers": 2, "ffn_hidden_size": 3, "num_query_groups": 2, "num_attention_heads": 2}
    kept = select(_scores(**equal), targets)
    assert kept.hidden == [0, 1, 2, 3, 4]
    assert list(kept.layers) == [1, 2]
    assert kept.layers[2].ffn == [[0, 1, 2]]
    assert kept.layers[2].groups == [0, 1]
    assert kept.layers[2].heads == [0, 2]


def test_experts_and_their_channels_are_chosen_in_each_layer():
    model = MODEL.with_(num_moe_experts=3, moe_router_topk=1)
    kept = select(_scores(model), {"num_moe_experts": 2, "ffn_hidden_size": 4})
    scores = _scores(model)
    for number, layer in kept.layers.items():
        assert layer.experts == sorted(scores.experts[number].argsort()[1:].tolist())
        assert layer.ffn == [sorted(channels.argsort()[2:].tolist()) for channels in scores.ffn[number]]


def test_dropping_keeps_the_other_layers_whole():
    kept = keep_layers(MODEL.with_(num_moe_experts=4), [1, 3])
    assert list(kept.layers) == [2]
    assert kept.layers[2].ffn == [range(6)] * 4
    assert kept.layers[2].experts == range(4)


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    data=st.data(),
)
def test_what_is_accepted_is_reached_and_what_stays_is_best(groups, per_group, data):
    model = MODEL.with_(num_query_groups=groups, num_attention_heads=groups * per_group)
    left = data.draw(st.integers(1, groups))
    targets = {"num_query_groups": left, "num_attention_heads": left * data.draw(st.integers(1, per_group))}
    targets |= {"hidden_size": data.draw(st.integers(1, 8)), "num_layers": data.draw(st.integers(1, 3))}
    sizes = PruningConfig(**{f"target_{name}": size for name, size in targets.items()}).pruned(model)
    scores = _scores(model)
    kept = select(scores, targets)
    assert len(kept.hidden) == sizes.hidden_size
    assert len(kept.layers) == sizes.num_layers
    assert scores.hidden[list(kept.hidden)].min() >= max((scores.hidden[c] for c in range(8) if c not in kept.hidden), default=0)
    for number, layer in kept.layers.items():
        assert (len(layer.groups), len(layer.heads)) == (sizes.num_query_groups, sizes.num_attention_heads)
        assert all(a < b for a, b in itertools.pairwise(layer.heads))
        assert {head // per_group for head in layer.heads} == set(layer.groups)
        for group in layer.groups:
            of_group = range(group * per_group, (group + 1) * per_group)
            best = max((scores.heads[number][h] for h in of_group if h not in layer.heads), default=0)
            assert min(scores.heads[number][h] for h in of_group if h in layer.heads) >= best
