"""The grid of a search, against ModelOpt's generator, and which candidates it returns."""

import nemo_opt._stack

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.prune.candidates import Candidate, candidates
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.footprint import footprint, parameters
from nemo_opt.prune.space import SearchSpace

TINY = preset("tiny")  # 4 layers, hidden 128, ffn 256, 8 heads in 4 groups
EIGHT_B = preset("llama3.1-8b")


def test_default_choices_are_modelopts_for_a_large_model():
    choices = SearchSpace().choices(EIGHT_B)
    # 40 % of 16 multiples of 256, of 28 of 512, of 4 multiples of the 8 groups; 20 % of 16 multiples of 2
    assert choices == {
        "hidden_size": list(range(2560, 4097, 256)),
        "ffn_hidden_size": list(range(8704, 14337, 512)),
        "num_attention_heads": [24, 32],
        "num_layers": [26, 28, 30, 32],
    }
    mixture = SearchSpace().choices(EIGHT_B.with_(num_moe_experts=128))
    assert mixture == choices | {"num_moe_experts": list(range(80, 129, 8))}  # 40 % of 16 multiples of 8


def test_default_choices_of_a_small_model_are_eighths():
    assert SearchSpace().choices(TINY) == {
        "hidden_size": [80, 96, 112, 128],
        "ffn_hidden_size": [160, 192, 224, 256],
        "num_attention_heads": [8],
        "num_layers": [4],
    }


def test_a_size_that_is_no_multiple_stays_a_choice():
    space = SearchSpace(hidden_size_divisor=50, max_width_pruning=1.0, max_depth_pruning=1.0)
    choices = space.choices(TINY)
    assert choices["hidden_size"] == [50, 100, 128]
    assert choices["num_attention_heads"] == [4, 8]
    assert choices["num_layers"] == [1, 2, 3, 4]


def test_sizes_that_cannot_change_or_must_not_are_left_out():
    skipped = SearchSpace(hparams_to_skip=["hidden_size", "num_layers"], num_layers_divisor=4, ffn_hidden_size_divisor=256)
    assert list(skipped.choices(TINY)) == ["num_attention_heads"]
    assert SearchSpace().choices(TINY.with_(num_attention_heads=4, num_layers=1)).keys() == {"hidden_size", "ffn_hidden_size"}


@settings(deadline=None, max_examples=30)
@given(
    width=st.floats(0.01, 1.0), depth=st.floats(0.01, 1.0), divisor=st.integers(12, 128), layers=st.integers(1, 9), heads=st.integers(1, 6)
)
@example(width=1.0, depth=1.0, divisor=128, layers=1, heads=1)  # no size has a choice
def test_the_grid_is_modelopts(width, depth, divisor, layers, heads):
    model = TINY.with_(num_layers=layers, num_attention_heads=4 * heads, kv_channels=16)
    space = SearchSpace(max_width_pruning=width, max_depth_pruning=depth, hidden_size_divisor=divisor, hparams_to_skip=["ffn_hidden_size"])
    everything = {
        "hidden_size": sorted({*range(divisor, 129, divisor), 128}),
        "num_attention_heads": [4 * n for n in range(1, heads + 1)],
        "num_layers": list(range(1, layers + 1)),
    }
    theirs = MCoreMinitronSearcher._generate_search_space_combos(everything, width, depth)
    config = PruningConfig(target_params=parameters(model), search=space)
    ours = [candidate.sizes for candidate in candidates(model, config)]
    assert sorted(map(sorted, (c.items() for c in ours))) == sorted(map(sorted, (c.items() for c in theirs)))


def config(**limits):
    return PruningConfig(**limits, search=SearchSpace(max_width_pruning=1.0, max_depth_pruning=1.0, num_layers_divisor=1))


def test_all_are_within_every_limit_and_none_is_forgotten():
    limit = parameters(TINY) * 0.6
    found = candidates(TINY, config(target_params=limit, target_memory_mb=2.0))
    assert all(c.metrics["params"] <= limit and c.metrics["memory_mb"] <= 2.0 and c.score is None for c in found)
    space = config(target_params=1).search.choices(TINY)
    assert len(found) < len(candidates(TINY, config(target_params=limit)))
    assert len(candidates(TINY, config(target_params=parameters(TINY)))) == 8 * 8 * 2 * 4 == len(space["hidden_size"]) * 64
    for candidate in found:
        assert candidate.metrics == footprint(TINY.with_(kv_channels=16, **candidate.sizes))


@pytest.mark.parametrize(
    ("limits", "first"),
    [
        ({"target_memory_mb": 2.0}, "memory_mb"),
        ({"target_memory_mb": 2.0, "target_params": 5e5}, "params"),
        ({"target_params": 5e5, "target_active_params": 4e5, "target_memory_mb": 3.0}, "active_params"),
    ],
)
def test_the_first_metric_in_modelopts_order_ranks(limits, first):
    values = [c.metrics[first] for c in candidates(TINY, config(**limits))]
    assert len(values) > 10
    assert values == sorted(values, reverse=True)


def test_a_limit_is_inclusive():
    exactly = candidates(TINY, config(target_params=5e5))[0].metrics["params"]
    assert candidates(TINY, config(target_params=exactly))[0].metrics["params"] == exactly
    assert candidates(TINY, config(target_params=exactly - 1))[0].metrics["params"] < exactly


def test_memory_counts_the_cache_that_was_asked_for():
    limits = {"target_memory_mb": 1.9}
    large = PruningConfig(**limits, search=SearchSpace(max_width_pruning=1.0, seq_length=64, batch_size=1))
    small = PruningConfig(**limits, search=SearchSpace(max_width_pruning=1.0, seq_length=64, batch_size=10))
    assert candidates(TINY, large)[0].metrics["params"] > candidates(TINY, small)[0].metrics["params"]


def test_what_the_layout_cannot_split_is_left_out():
    space = SearchSpace(max_width_pruning=1.0, ffn_hidden_size_divisor=1, hparams_to_skip=["hidden_size", "num_layers"])
    limited = PruningConfig(target_params=parameters(TINY), search=space)
    assert {c.sizes["ffn_hidden_size"] % 2 for c in candidates(TINY, limited)} == {0, 1}
    assert {c.sizes["ffn_hidden_size"] % 2 for c in candidates(TINY, limited, tp=2)} == {0}
    assert {c.sizes["num_attention_heads"] for c in candidates(TINY, limited, tp=8)} == {8}


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"no architecture .* fits params <= 1,000; the smallest there have params 604,880: raise"):
        candidates(TINY, PruningConfig(target_params=1000))


def test_a_space_without_choices_is_the_model_itself():
    whole = parameters(TINY)
    space = SearchSpace(hparams_to_skip=["hidden_size", "ffn_hidden_size", "num_attention_heads", "num_layers"])
    (itself,) = candidates(TINY, PruningConfig(target_params=whole, search=space))
    assert (itself.sizes, itself.metrics) == ({}, footprint(TINY))
    with pytest.raises(ConfigError, match=rf"the smallest there have params {whole:,}: raise the limit"):
        candidates(TINY, PruningConfig(target_params=whole - 1, search=space))


def test_experts_are_searched_and_split():
    model = TINY.with_(num_moe_experts=8)
    space = SearchSpace(max_width_pruning=1.0, hparams_to_skip=["hidden_size", "ffn_hidden_size", "num_attention_heads"])
    limited = PruningConfig(target_params=parameters(model), search=space)
    assert [c.sizes["num_moe_experts"] for c in candidates(model, limited)] == [8, 7, 6, 5, 4, 3, 2]  # two are routed to
    assert [c.sizes["num_moe_experts"] for c in candidates(model, limited, ep=4)] == [8, 4]
    active = [c.metrics["active_params"] for c in candidates(model, limited)]
    assert active == [active[0] - 4 * 128 * gone for gone in range(7)], "only the router shrinks"


def test_a_candidate_says_what_it_is():
    assert Candidate(sizes={"num_layers": 2}, metrics={"params": 3.0}).score is None
