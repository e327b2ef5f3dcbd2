"""Mixed precision: what is refused, and that a search's recipe keeps its budget and gives the same model at every layout."""

from io import StringIO
from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize import auto
from nemo_opt.quantize.auto import _Choice, _solve, search_mixed_precision
from nemo_opt.quantize.blocks import weight_cfgs
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


class _Linear(torch.nn.Module):
    def __init__(self, is_row):
        super().__init__()
        if is_row is not None:
            self._is_row_parallel = is_row


def _found_by(searched, tp=1):
    """What a search makes of upstream's statistics: a row-parallel linear, one of two modules, and the head."""
    model = torch.nn.Module()
    model.row, model.q, model.kv, model.output_layer = _Linear(True), _Linear(None), _Linear(True), _Linear(False)
    state, batches = {"best": {"recipe": "upstream's"}}, [{"tokens": 1}, {"tokens": 2}, {"tokens": 3}]

    def stats(names, scores, size):
        return {"module_names": names, "formats": state["recipes"], "scores": scores, "costs": [size / 4, size / 2, size]}

    def search(given_model, **settings):
        assert given_model is model
        recipes = [auto.QuantRecipe(quant_cfg, name="CUSTOM") for quant_cfg in settings["quantization_formats"]]
        state["recipes"] = [*recipes, auto.QuantRecipe(None)]
        state["candidate_stats"] = {
            "row.hparam": stats(["row"], [8.0, 4.0, 0.0], 100.0),
            "attention.hparam": stats(["q", "kv"], [9.0, 3.0, 0.0], 100.0),
            "head.hparam": stats(["output_layer"], [7.0, 7.0, 0.0], 0.0),
        }
        return None, state

    searched.side_effect = search
    recipe = {"quant_cfg": [{"quantizer_name": "*q*"}], "algorithm": "other"}
    with (
        patch.object(auto, "unwrap", side_effect={"chunk": model}.get),
        patch.object(auto, "get_auto_quantize_config", return_value=recipe) as made,
        patch.object(auto.parallel_state, "get_tensor_model_parallel_world_size", return_value=tp),
        patch.object(auto.dist, "broadcast_object_list") as sent,
    ):
        result = search_mixed_precision(["chunk"], iter(batches), effective_bits=6, candidates=CANDIDATES)
    assert sent.call_args.kwargs == {"src": 0}
    assert made.call_args.args == (state,)
    return result, state, searched.call_args.kwargs, batches


def test_a_search_is_upstreams_statistics_and_an_exact_choice(one_rank):
    result, state, _, _ = _found_by(one_rank)
    four, eight, none = state["recipes"]
    # 6 bits of 16 of 200 are 75 = 25 + 50: eight bits where four cost more
    assert state["best"]["recipe"] == {"attention.hparam": eight, "row.hparam": four, "head.hparam": none}
    assert result.recipe == {"quant_cfg": [{"quantizer_name": "*q*"}], "algorithm": "max"}
    assert result.effective_bits == 6
    assert result.formats == {"q": "int8", "kv": "int8", "row": "int4"}
    attention = {"int4": 9, "int8": 3, "none": 0}
    assert result.scores == {"q": attention, "kv": attention, "row": {"int4": 8, "int8": 4, "none": 0}}
    assert list(result.formats) == ["q", "kv", "row"], "by name, whatever the order of upstream's statistics"
    with pytest.raises(AttributeError):
        result.effective_bits = 7


def test_scores_of_row_parallel_linears_are_counted_once(one_rank):
    result, _, _, _ = _found_by(one_rank, tp=2)
    assert result.scores["row"] == {"int4": 4, "int8": 2, "none": 0}
    assert result.scores["q"] == {"int4": 9, "int8": 3, "none": 0}, "the first of its modules says what it is"


def test_what_upstream_is_asked(one_rank):
    _, _, asked, batches = _found_by(one_rank)
    head = ["*output_layer*"]
    assert asked["constraints"] == {"effective_bits": 6, "cost": {"excluded_module_name_patterns": head}}
    assert asked["disabled_layers"] == head
    assert asked["data_loader"] == batches
    assert asked["num_calib_steps"] == asked["num_score_steps"] == 3
    for quant_cfg, bits in zip(asked["quantization_formats"], (4, 8), strict=True):
        assert quant_cfg["algorithm"] == "max"
        names = [entry["quantizer_name"] for entry in quant_cfg["quant_cfg"]]
        assert not any("bmm" in name for name in names), "the cache is none of the linears' budget"
        assert next(auto_cfg["num_bits"] for auto_cfg in weight_cfgs(quant_cfg)) == bits
    losses = torch.tensor([[1.0, 2.0, 30.0]])
    model = lambda *args, **kwargs: (args, kwargs)  # noqa: E731
    shown = asked["forward_step"](model, {"tokens": 1, "position_ids": 2, "attention_mask": 3, "labels": 4})
    assert shown == ((1, 2, 3), {"labels": 4})
    assert asked["forward_step"](model, {"tokens": 1, "position_ids": 2, "labels": 4}) == ((1, 2, None), {"labels": 4})
    assert asked["loss_func"](losses, {}) == 11
    assert asked["loss_func"](losses, {"loss_mask": torch.tensor([[1, 1, 0]])}) == 1.5
    assert asked["loss_func"](losses, {"loss_mask": torch.zeros(1, 3)}) == 0


@pytest.mark.parametrize(("rank", "is_terminal", "shown"), [(0, True, True), (0, False, False), (1, True, False)])
def test_upstreams_bars_are_for_terminals(one_rank, rank, is_terminal, shown):
    bars = []
    with (
        patch.object(auto.dist, "get_rank", return_value=rank),
        patch.object(auto.sys.stderr, "isatty", return_value=is_terminal, create=True),
        auto._progress_on_terminals_only(),
    ):
        bars.append(auto.algorithms.tqdm([1], file=StringIO()))
    assert bars[0].disable is not shown


def test_no_choice_within_the_budget_is_refused(one_rank):
    with (
        patch.object(auto.dist, "broadcast_object_list"),
        pytest.raises(ConfigError, match=r"^no choice of formats meets 3 bits a weight: raise the budget or add a smaller format"),
    ):
        _solve({"a": [_Choice(None, 1.0, 25.0), _Choice(None, 0.0, 100.0)]}, 3)


@pytest.mark.parametrize(("bits", "picked"), [(4, 0), (7.99, 0), (8, 1), (15.9, 1), (16, 2)])
def test_budgets_are_met_to_the_bit(bits, picked):
    with patch.object(auto.dist, "broadcast_object_list"):
        assert _solve({"a": [_Choice(None, 1e-12, 25.0), _Choice(None, 1e-13, 50.0), _Choice(None, 0.0, 100.0)]}, bits) == {"a": picked}


@pytest.mark.parametrize("bits", [4, 16])
def test_budgets_at_the_ends_are_accepted(bits):
    auto._check_budget(bits, {config.algorithm: auto._format(config) for config in CANDIDATES})


def test_rank_0_decides():
    def broadcast(picked, src):
        picked[0] = "rank 0's"

    choice = _Choice(None, 0.0, 1.0)
    with patch.object(auto.dist, "broadcast_object_list", broadcast):
        assert _solve({"a": [choice]}, 16) == "rank 0's"
    with pytest.raises(AttributeError):
        choice.score = 1.0


def test_recipes_hold_no_types_of_upstream():
    quant_cfg = {"quant_cfg": [{"cfg": {"num_bits": (4, 3), -1: 16}}], "algorithm": None}

    class Upstreams(dict):
        pass

    plain = auto._plain(Upstreams(quant_cfg=[Upstreams(quant_cfg["quant_cfg"][0])], algorithm=None))
    assert plain == quant_cfg
    assert type(plain) is type(plain["quant_cfg"][0]) is dict
