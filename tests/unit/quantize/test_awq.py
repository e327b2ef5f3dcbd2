"""AWQ from Gram matrices: upstream's alphas, scales and state on a single rank, and the single rank's on every layout, unlike upstream."""

from types import SimpleNamespace

import pytest
import torch

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.parallel import Topology
from nemo_opt.quantize.awq import awq_alphas, awq_scale

TOL = 1e-5
"""Relative, of scales; they are powers of means, which other layouts sum in another order (8e-7 seen)."""
FORMATS = ("INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_LITE_CFG", "FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG")
"""With blocks, as AWQ is used; and with an amax of the tensor and of rows, which tensor parallel ranks share."""
BLOCK = 8


def _quant_cfg(name):
    import copy

    import modelopt.torch.quantization as mtq

    from nemo_opt.quantize.blocks import weight_cfgs

    quant_cfg = copy.deepcopy(getattr(mtq, name))
    for cfg in weight_cfgs(quant_cfg):
        if cfg.get("block_sizes", {}).get("type") == "static":  # NVFP4's are fixed
            cfg["block_sizes"][-1] = BLOCK
    return quant_cfg


def _build(topology, spec, moe=False):
    from nemo_opt.models.build import build_model
    from nemo_opt.testing.parity import TINY, TINY_MOE

    chunks = build_model(TINY_MOE if moe else TINY.with_(num_layers=2, ffn_hidden_size=64), topology, spec=spec, seed=5)
    with torch.no_grad():  # activations whose channels differ, or every alpha is as good
        for name, weight in chunks[0].named_parameters():
            if "norm" in name and weight.dim() == 1:
                weight.copy_(torch.linspace(-3, 2, weight.numel()).exp())
    return chunks


def _batches(topology, packing="pack"):
    from megatron.core import parallel_state

    from nemo_opt.data.calibration import calibration_batches

    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 120, (size,), generator=generator).tolist() for size in (31, 15, 15, 27, 3, 19, 11, 63)]
    shard = {"dp_rank": parallel_state.get_data_parallel_rank(), "dp_size": topology.dp or 1}
    sizes = {"seq_length": 16, "num_samples": 8, "micro_batch_size": 2, "multiple": 4 if packing == "pack" else None}
    return calibration_batches(documents, SimpleNamespace(eod=0), packing=packing, **sizes, **shard)


def _facts(chunks):
    """Everything the search leaves: by checkpoint's names, so that layouts compare."""
    from nemo_opt.quantize.tensors import quantizer_tensors

    return {key: tensor.clone() for key, tensor in quantizer_tensors(chunks) if tensor is not None}


def _ours(name, spec, formats, moe=False, packing="pack"):
    import modelopt.torch.quantization as mtq

    from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.awq import calibrate_awq
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology.from_name(name))
    repair_amax_sharding()
    results = {}
    for fmt in formats:
        chunks = _build(topology, spec, moe)
        mtq.quantize(chunks[0], _quant_cfg(fmt) | {"algorithm": None})
        loop = calibration_loop(_batches(topology, packing))
        alphas = calibrate_awq(chunks[0], loop)
        results[fmt] = {"alphas": alphas, "facts": _facts(chunks), "passes": loop.report.passes, "weights": _weights(chunks)}
    return results


def _weights(chunks):
    return {name: weight.detach().clone() for name, weight in chunks[0].named_parameters() if "linear" in name and weight.dim() == 2}


def _upstream(name, spec, formats, moe=False):
    """Upstream's own search; its alphas by linear."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology.from_name(name))
    repair_amax_sharding()
    results = {}
    for fmt in formats:
        chunks = _build(topology, spec, moe)
        loop = calibration_loop(_batches(topology))
        mtq.quantize(chunks[0], _quant_cfg(fmt) | {"algorithm": {"method": "awq_lite", "debug": True}}, loop)
        alphas = {name: module.awq_lite.best_alpha for name, module in chunks[0].named_modules() if hasattr(module, "awq_lite")}
        for module in chunks[0].modules():
            module.__dict__.pop("awq_lite", None)
        results[fmt] = {"alphas": alphas, "facts": _facts(chunks), "passes": loop.report.passes, "weights": _weights(chunks)}
    return results


def _assert_close(result, expected, tol=TOL):
    assert result.keys() == expected.keys()
    for key, value in result.items():
        torch.testing.assert_close(value, expected[key], rtol=tol, atol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def single(ranks):
    return ranks(1).run(_ours, "TP1PP1", "te", FORMATS)[0]


@pytest.fixture(scope="module")
def upstream(ranks):
    return ranks(1).run(_upstream, "TP1PP1", "local", FORMATS)[0]


@pytest.mark.ranks
def test_alphas_scales_and_amax_are_upstreams(ranks, upstream):
    ours = ranks(1).run(_ours, "TP1PP1", "local", FORMATS)[0]
    for fmt, expected in upstream.items():
        assert ours[fmt]["alphas"] == expected["alphas"]
        assert len(set(expected["alphas"].values())) > 2
        _assert_close(ours[fmt]["facts"], expected["facts"])
        _assert_close(ours[fmt]["weights"], expected["weights"])
        assert (ours[fmt]["passes"], expected["passes"]) == (1, 2)
    assert any("pre_quant_scale" in key for key in ours["INT4_AWQ_CFG"]["facts"])


@pytest.mark.ranks
@pytest.mark.wide
def test_both_specs_give_the_same_scales(single, upstream):
    for fmt, expected in upstream.items():
        assert single[fmt]["alphas"] == expected["alphas"]
        _assert_close(single[fmt]["facts"], expected["facts"])


@pytest.mark.ranks
@pytest.mark.wide
def test_upstream_measures_before_the_norm_that_transformer_engine_fuses(ranks, upstream):
    """Turns red when upstream takes a LayerNormLinear's statistics from what is multiplied; its module's input is not yet normalised."""
    fused = ranks(1).run(_upstream, "TP1PP1", "te", FORMATS[1:2])[0]["W4A8_AWQ_BETA_CFG"]
    expected = upstream["W4A8_AWQ_BETA_CFG"]
    wrong = {key for key, value in fused["facts"].items() if not torch.allclose(value, expected["facts"][key], rtol=0.05)}
    assert any("linear_qkv.input_quantizer._amax" in key for key in wrong)
    assert any("linear_fc1.input_quantizer._amax" in key for key in wrong)
    assert not any("linear_proj" in key or "linear_fc2" in key for key in wrong)


@pytest.mark.ranks
@pytest.mark.wide
def test_experts_too(ranks):
    """Each sees its own tokens. Upstream weighs micro-batches alike, however few of their tokens come to an expert: alphas may differ."""
    ours, upstream = (ranks(1).run(function, "TP1PP1", "local", FORMATS[:2], True)[0] for function in (_ours, _upstream))
    for fmt, result in ours.items():
        assert result["alphas"].keys() == upstream[fmt]["alphas"].keys()
        dense = {name: alpha for name, alpha in result["alphas"].items() if "experts" not in name}
        assert dense == {name: upstream[fmt]["alphas"][name] for name in dense}
        assert any("experts" in name for name in result["alphas"])


LAYOUTS = [("TP2PP1", FORMATS), ("CP2", FORMATS[:1])]
WIDE = [(name, FORMATS) for name in ("TP2PP1SP", "TP1PP2", "TP2PP2", "DP2")]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "formats"), [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.wide, id=case[0]) for case in WIDE)])
def test_every_layout_finds_the_single_ranks_scales(ranks, single, name, formats):
    results = ranks(Topology.from_name(name).world_size).run(_ours, name, "te", formats)
    for fmt in formats:
        _assert_close(results[0][fmt]["facts"], single[fmt]["facts"])
        if "PP2" not in name:
            assert all(result[fmt]["alphas"] == single[fmt]["alphas"] for result in results)


@pytest.mark.ranks
@pytest.mark.wide
def test_upstream_finds_others_under_tensor_parallelism(ranks, single):
    """Turns red when upstream's ranks agree on statistics and losses instead of averaging scales."""
    upstream = ranks(2).run(_upstream, "TP2PP1", "te", FORMATS[:1])
    alphas = [result["INT4_AWQ_CFG"]["alphas"] for result in upstream]
    assert alphas[0] != alphas[1]
    facts = upstream[0]["INT4_AWQ_CFG"]["facts"]
    expected = single["INT4_AWQ_CFG"]["facts"]
    assert max(float((facts[key] / expected[key] - 1).abs().max()) for key in expected if "pre_quant_scale" in key) > 0.01


def _padded(masked=True):
    """Alphas and scales from documents in padded rows, and from each in a row of its own length."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.awq import calibrate_awq
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology())
    padded = _batches(topology, "pad")
    lengths = [
        int(row.sum())
        for batch in padded
        for row in (batch["attention_mask"] if batch["attention_mask"] is not None else batch["tokens"] * 0 + 1)
    ]
    rows = [row[None, :length] for row, length in zip((row for batch in padded for row in batch["tokens"]), lengths, strict=True)]
    alone = [{"tokens": row, "position_ids": torch.arange(row.shape[1])[None]} for row in rows]
    found = []
    for batches in (padded, alone):
        if not masked:
            batches = [batch | {"attention_mask": None} for batch in batches]
        chunks = _build(topology, "te")
        mtq.quantize(chunks[0], _quant_cfg("W4A8_AWQ_BETA_CFG") | {"algorithm": None})
        found.append((calibrate_awq(chunks[0], calibration_loop(batches)), _facts(chunks)))
    return found


@pytest.mark.ranks
def test_padding_enters_no_statistic(ranks):
    (alphas, facts), (expected_alphas, expected) = ranks(1).run(_padded)[0]
    assert alphas == expected_alphas
    _assert_close(facts, expected)
    (_, facts), (_, expected) = ranks(1).run(_padded, masked=False)[0]
    with pytest.raises(AssertionError):
        _assert_close(facts, expected)


def _state(search):
    """Names of the recorded modes, and the quantizers' recorded states after the last."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.mode import AWQLiteModeDescriptor

    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.awq import calibrate_awq
    from nemo_opt.quantize.calibration import calibration_loop

    before = AWQLiteModeDescriptor._calib_func
    topology = initialize(Topology())
    chunks, loop = _build(topology, "local"), calibration_loop(_batches(topology))
    if search == "ours":
        mtq.quantize(chunks[0], _quant_cfg("W4A8_AWQ_BETA_CFG") | {"algorithm": None})
        calibrate_awq(chunks[0], loop)
    else:
        mtq.quantize(chunks[0], _quant_cfg("W4A8_AWQ_BETA_CFG"), loop)
    assert AWQLiteModeDescriptor._calib_func is before
    recorded = mto.modelopt_state(chunks[0])["modelopt_state_dict"]
    return [name for name, _ in recorded], recorded[-1][1]["metadata"]["quantizer_state"], list(chunks[0].state_dict())


@pytest.mark.ranks
@pytest.mark.wide
def test_what_modelopt_saves_is_what_its_own_search_leaves(ranks):
    (modes, state, names), (upstream_modes, upstream_state, upstream_names) = (ranks(1).run(_state, who)[0] for who in ("ours", "theirs"))
    assert [mode for mode in modes if mode != "_no_calibrate"] == upstream_modes
    assert modes[-1] == "awq_lite_calibrate"
    assert state.keys() == upstream_state.keys()
    for key, value in state.items():  # beside a note of what came in while the quantizer was disabled, as ours never was
        value.pop("_input_dtype", None), upstream_state[key].pop("_input_dtype", None)
        assert str(value) == str(upstream_state[key])
    assert names == upstream_names


def _refusals():
    """Errors of linears of several experts, of NaN activations, and of activations along another axis."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.awq import calibrate_awq
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology())
    loop = calibration_loop(_batches(topology))
    errors = []
    for case in ("grouped", "nan", "axis"):
        chunks = _build(topology, "te" if case == "grouped" else "local", moe=case == "grouped")
        mtq.quantize(chunks[0], _quant_cfg("W4A8_AWQ_BETA_CFG" if case == "axis" else "INT4_AWQ_CFG") | {"algorithm": None})
        if case == "nan":
            chunks[0].decoder.layers[1].self_attention.linear_qkv.weight.data[0, 0] = float("nan")
        if case == "axis":
            chunks[0].decoder.layers[1].mlp.linear_fc1.input_quantizer.axis = 0
        try:
            calibrate_awq(chunks[0], loop)
        except (ConfigError, DataError) as error:
            errors.append((type(error).__name__, str(error)))
    return errors


@pytest.mark.ranks
def test_what_cannot_be_searched_is_refused_by_name(ranks):
    (grouped, nan, axis) = ranks(1).run(_refusals)[0]
    assert grouped[0] == axis[0] == "ConfigError"
    assert "mlp.experts.linear_fc1, which holds the weights of several experts" in grouped[1]
    assert nan[0] == "DataError"
    assert "3 linears have inputs that are not finite, first decoder.layers.1.self_attention.linear_proj" in nan[1]
    assert "layers.1.mlp.linear_fc1" in axis[1]
    assert "axis 0" in axis[1]


def test_alphas_run_from_0_to_1():
    assert awq_alphas(0.1) == pytest.approx([0.1 * i for i in range(11)])
    assert awq_alphas(1) == [0, 1]


def test_scale_is_the_papers_within_limits():
    activation, weight = torch.tensor([4.0, 9.0, 0.0, 1e9]), torch.tensor([0.25, 1.0, 0.5, 1e-9])
    torch.testing.assert_close(awq_scale(activation, weight, 0.5), torch.tensor([4.0, 3.0, 1e-4, 1e4]))
    torch.testing.assert_close(awq_scale(activation, weight, 0.0), torch.tensor([4.0, 1.0, 2.0, 1e4]))
