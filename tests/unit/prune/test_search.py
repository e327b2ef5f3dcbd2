"""A search on a real tiny model, on one rank in this process: what is scored, what is chosen, and that the model is as it was."""

from unittest.mock import patch

import nemo_opt._stack

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import model_config_of
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune.candidates import candidates
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.footprint import parameters
from nemo_opt.prune.importance import measure_importance
from nemo_opt.prune.pruner import prune_language_model
from nemo_opt.prune.search import pruned, search_architecture
from nemo_opt.testing import pruning as testing
from nemo_opt.training.forward import forward_loop

SMALL = preset(
    "tiny", num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
LIMIT = 0.6 * parameters(SMALL)
CONFIG = PruningConfig(target_params=LIMIT, search={"max_width_pruning": 1.0, "max_depth_pruning": 1.0, "top_k": 3})


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture(scope="module")
def measured(one_rank):
    chunks = testing.contrasted_model(one_rank, SMALL, "local")
    return chunks, measure_importance(chunks, forward_loop(testing.batches(count=1), description="test"))


@pytest.fixture
def unchanged(measured):
    """Checks afterwards that the model is what it was: modules, weights, settings and sizes."""
    (model,), _ = measured
    modules, weights = dict(model.named_modules()), {name: p.clone() for name, p in model.named_parameters()}
    attributes, settings = dict(vars(model)), dict(vars(model.config))
    yield
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert vars(model) == attributes
    assert vars(model.config) == settings
    assert model_config_of(model) == SMALL


def test_the_largest_candidates_are_scored_and_the_best_is_found(measured, unchanged):
    chunks, scores = measured
    seen = []

    def score(model):
        assert model is chunks
        seen.append(model_config_of(model[0]))
        assert parameters(seen[-1]) == sum(p.numel() for p in model[0].parameters()) <= LIMIT
        return [1, 3, 2][len(seen) - 1]

    result = search_architecture(chunks, CONFIG, scores, score)
    fitting = candidates(SMALL, CONFIG)
    assert result.fitting == len(fitting) > 3
    assert [c.sizes for c in result.scored] == [c.sizes for c in fitting[:3]]
    assert [c.metrics for c in result.scored] == [c.metrics for c in fitting[:3]]
    assert [c.score for c in result.scored] == [1.0, 3.0, 2.0]
    assert all(isinstance(c.score, float) for c in result.scored)
    assert result.best == result.scored[1]
    assert [{name: getattr(sizes, name) for name in c.sizes} for sizes, c in zip(seen, fitting[:3], strict=True)] == [
        c.sizes for c in fitting[:3]
    ]


def test_of_equal_scores_the_larger_wins(measured, unchanged):
    chunks, scores = measured
    result = search_architecture(chunks, CONFIG, scores, lambda _: 0.5)
    assert result.best == result.scored[0]


def test_a_candidate_is_cut_by_the_scores(measured, unchanged):
    (model,), scores = measured
    weight = model.decoder.layers[0].mlp.linear_fc2.weight.clone()
    with pruned(model, scores, {"hidden_size": 8}):
        stay = sorted(scores.hidden.argsort(descending=True)[:8].tolist())
        assert torch.equal(model.decoder.layers[0].mlp.linear_fc2.weight, weight[stay])


@pytest.mark.parametrize("failing", [lambda _: 1 / 0, lambda _: "no number"])
def test_a_score_that_fails_leaves_the_model_as_it_was(measured, unchanged, failing):
    with pytest.raises((ZeroDivisionError, ValueError)):
        search_architecture(*measured[:1], CONFIG, measured[1], failing)


def test_a_score_that_is_no_number_is_refused(measured, unchanged):
    with pytest.raises(ConfigError, match=r"score of \{'hidden_size': .*must be one number on all ranks, got \[nan\]: reduce it"):
        search_architecture(measured[0], CONFIG, measured[1], lambda _: float("nan"))


def test_ranks_that_disagree_are_refused(measured, unchanged):
    def gather(everyone, value):
        assert everyone == [None] * 2
        everyone[:] = [value, value + 1]

    with (
        patch("nemo_opt.prune.search.dist.get_world_size", return_value=2),
        patch("nemo_opt.prune.search.dist.all_gather_object", gather),
        patch("nemo_opt.prune.search.slice_model"),
        pytest.raises(ConfigError, match=r"got \[1\.0, 2\.0\]"),
    ):
        search_architecture(measured[0], CONFIG, measured[1], lambda _: 1)


def test_what_cannot_be_searched_is_refused(measured, unchanged):
    chunks, scores = measured
    with pytest.raises(ConfigError, match="within the limits already"):
        search_architecture(chunks, PruningConfig(target_params=parameters(SMALL)), scores, len)
    with patch.object(type(scores), "check_model", side_effect=ConfigError("other sizes")), pytest.raises(ConfigError, match="other sizes"):
        search_architecture(chunks, CONFIG, scores, len)


def test_the_layout_must_be_able_to_split_what_is_scored(measured):
    chunks, scores = measured
    layout = {"tensor_model_parallel_size": 3, "expert_model_parallel_size": 5}
    with (
        patch.multiple(chunks[0].config, **layout),
        patch("nemo_opt.prune.search.model_config_of", return_value=SMALL),
        patch("nemo_opt.prune.search.candidates", side_effect=ConfigError("asked")) as asked,
        pytest.raises(ConfigError, match="asked"),
    ):
        search_architecture(chunks, CONFIG, scores, len)
    asked.assert_called_once_with(SMALL, CONFIG, tp=3, ep=5)


def test_pruning_by_limits_gives_what_the_search_finds(one_rank):
    chunks = testing.contrasted_model(one_rank, SMALL, "local")
    seen = []

    def smallest(model):
        seen.append(model_config_of(model[0]))
        return -parameters(seen[-1])

    loop = forward_loop(testing.batches(count=1), description="test")
    assert prune_language_model(chunks, CONFIG, loop, score_function=smallest) is chunks
    assert model_config_of(chunks[0]) == min(seen, key=parameters)
