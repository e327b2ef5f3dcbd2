"""Mixed precision: what is refused, and that a search's recipe keeps its budget and gives the same model at every layout."""

from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize.auto import _Choice, _solve, search_mixed_precision
from nemo_opt.quantize.config import QuantizationConfig

SMALL = preset(
    "tiny",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)
BUDGET = 6.0
CANDIDATES = [QuantizationConfig(algorithm=name, awq_block_size=16) for name in ("int4", "int8")]
SCORE_TOLERANCE = 1e-3
"""Relative; 3e-5 seen: sums of squares of small differences, in another order."""
LINEARS = {
    f"decoder.layers.{layer}.{linear}"
    for layer in range(2)
    for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
}


def _batches():
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(2)]
    positions = torch.arange(16).expand(2, 16)
    return [{"tokens": part, "labels": part.roll(-1, 1), "position_ids": positions, "attention_mask": None} for part in tokens]


def _search(name):
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    return search_mixed_precision(build_model(SMALL, topology, seed=5), _batches(), effective_bits=BUDGET, candidates=CANDIDATES)


def _quantize(name, recipe):
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.quantizer import Quantizer
    from nemo_opt.quantize.tensors import quantizer_settings

    chunks = build_model(SMALL, initialize(Topology.from_name(name)), seed=5)
    Quantizer(QuantizationConfig(algorithm=recipe)).quantize(chunks, calibration_loop(_batches()))
    return quantizer_settings(chunks)


@pytest.fixture(scope="module")
def found(ranks):
    return ranks(1).run(_search, "TP1PP1")[0]


@pytest.mark.ranks
def test_budget_is_kept_and_spent(found):
    assert found.formats.keys() == LINEARS
    assert set(found.formats.values()) <= {"int4", "int8", "none"}
    bits = {"int4": 4, "int8": 8, "none": 16}
    sizes = {name: 64 * {"qkv": 128, "roj": 64, "fc1": 256, "fc2": 128}[name[-3:]] for name in LINEARS}
    spent = sum(sizes[name] * bits[found.formats[name]] for name in LINEARS) / sum(sizes.values())
    assert found.effective_bits == pytest.approx(spent)
    assert 4 < found.effective_bits <= BUDGET


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP2PP1", pytest.param("DP2", marks=pytest.mark.wide)])
def test_every_layout_finds_the_same(ranks, found, layout):
    for other in ranks(2).run(_search, layout):
        assert (other.formats, other.recipe) == (found.formats, found.recipe)
        for name, scores in other.scores.items():  # DP2 sees the samples on both ranks here, and sums: twice as much everywhere
            expected = {label: score * (2 if layout == "DP2" else 1) for label, score in found.scores[name].items()}
            assert scores == pytest.approx(expected, rel=SCORE_TOLERANCE)


def _upstreams_scores(name):
    from nemo_opt.quantize import auto

    with patch.object(auto, "_scored", lambda model, stats: [auto._Choice(*v) for v in zip(*_columns(stats), strict=True)]):
        return _search(name).scores


def _columns(stats):
    return stats["formats"], stats["scores"], stats["costs"]


@pytest.mark.ranks
def test_upstream_counts_row_parallel_linears_once_a_rank(ranks, found):
    scores = ranks(2).run(_upstreams_scores, "TP2PP1")[0]
    for name, by_format in found.scores.items():
        times = 2 if name.endswith(("linear_proj", "linear_fc2")) else 1  # if it is 1 everywhere, ModelOpt has mended it
        assert scores[name]["int4"] == pytest.approx(times * by_format["int4"], rel=SCORE_TOLERANCE)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from([1.0, 2.0, 4.0])), min_size=1, max_size=5), st.floats(4, 16))
def test_solution_is_the_best_of_all(linears, bits):
    choices = {
        f"{i}": [_Choice(None, four, size), _Choice(None, eight, 2 * size), _Choice(None, 0.0, 4 * size)]
        for i, (four, eight, size) in enumerate(linears)
    }
    with patch("nemo_opt.quantize.auto.dist.broadcast_object_list"):
        solved = [choices[name][index] for name, index in _solve(choices, bits).items()]
    assert len(solved) == len(choices)
    budget = sum(options[-1].cost for options in choices.values()) * bits / 16
    slack = 1 + 1e-6  # the solver's own tolerance
    assert sum(choice.cost for choice in solved) <= budget * slack

    def best(most):
        totals = ((sum(choice.cost for choice in some), sum(choice.score for choice in some)) for some in product(*choices.values()))
        return min(score for cost, score in totals if cost <= most)

    assert best(budget * slack) - 1e-6 <= sum(choice.score for choice in solved) <= best(budget) + 1e-6


@pytest.mark.ranks
def test_recipe_quantises_the_same_linears_on_every_stage(ranks, found, tmp_path):
    from nemo_opt.quantize.recipes import load_quant_cfg, save_quant_cfg

    path = tmp_path / "mixed.yaml"
    save_quant_cfg(found.recipe, path)
    assert load_quant_cfg(path) == found.recipe
    (single,) = ranks(1).run(_quantize, "TP1PP1", str(path))
    for stage in ranks(2).run(_quantize, "TP1PP2", str(path)):
        assert stage == single
    chosen = {name: str(setting.num_bits) for name, setting in single.items() if name.endswith("weight_quantizer")}
    assert chosen == {f"{name}.weight_quantizer": label[3:] for name, label in found.formats.items() if label != "none"}


@pytest.fixture
def one_rank():
    with (
        patch("nemo_opt.quantize.auto.parallel_state.get_pipeline_model_parallel_world_size", return_value=1) as stages,
        patch("nemo_opt.quantize.auto.parallel_state.get_tensor_model_parallel_world_size", return_value=1),
        patch("nemo_opt.quantize.auto.model_config_of", return_value=SMALL),
        patch("nemo_opt.quantize.auto.unwrap"),
        patch("nemo_opt.quantize.auto.dist.get_rank", return_value=0),
        patch("nemo_opt.quantize.auto.mtq.auto_quantize") as searched,
    ):
        searched.stages = stages
        yield searched


@pytest.mark.parametrize(
    ("candidates", "bits", "message"),
    [
        ([], 6, "needs candidates: name some of"),
        ([QuantizationConfig(algorithm="int4_awq")], 6, "'int4_awq' is not calibrated by maxima alone"),
        ([QuantizationConfig(algorithm="int4", awq_block_size=48)], 6, "blocks of 48 do not divide"),
        (CANDIDATES, 3.5, r"effective_bits 3.5 must lie between the smallest candidate \(4.0 of"),
        (CANDIDATES, 17, "effective_bits 17 must lie"),
    ],
)
def test_bad_searches_are_refused_before_any_work(one_rank, candidates, bits, message):
    with pytest.raises(ConfigError, match=message):
        search_mixed_precision([None], [], effective_bits=bits, candidates=candidates)
    one_rank.assert_not_called()


def test_pipeline_stages_are_refused_by_name(one_rank):
    one_rank.stages.return_value = 2
    with pytest.raises(ConfigError, match="needs pp 1; its recipe then quantises at any layout"):
        search_mixed_precision([None], [], effective_bits=6, candidates=CANDIDATES)


def test_upstreams_bars_are_given_back_when_it_fails(one_rank):
    from modelopt.torch.quantization import algorithms

    bar = algorithms.tqdm
    one_rank.side_effect = RuntimeError("upstream failed")
    with pytest.raises(RuntimeError, match="upstream failed"):
        search_mixed_precision([None], [], effective_bits=6, candidates=CANDIDATES)
    assert algorithms.tqdm is bar
