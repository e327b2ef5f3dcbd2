"""Every algorithm at every layout against the single rank, saved at each and loaded at another, with each amax beside its weights."""

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig

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
EXPERTS = SMALL.with_(num_layers=1, num_moe_experts=4, moe_router_topk=2)
SEARCHED = ("int4_awq", "int8_sq", "w4a8_awq")
"""Algorithms whose weights are scaled by what a search over activations found."""
TP_TOLERANCE = 5e-7
"""Relative, of activations' maxima: tensor and context parallel ranks sum in another order (1.2e-7 seen). 0 at other layouts."""
SEARCH_TOLERANCE = 1e-5
"""Relative, of scales found by a search, and of weights divided by them."""
LOGITS_TOLERANCE = 1e-2
"""Absolute, of logits of size 1: an activation that differs in the last bit may lie beside a rounding edge."""
CASES = tuple(ALGORITHMS)
MAX_CALIBRATED = tuple(algorithm for algorithm in CASES if algorithm not in SEARCHED)
FEW = ("int8", "w4a8_awq")


def config(algorithm):
    return QuantizationConfig(algorithm=algorithm, awq_block_size=16, fp8_block_shape=(16, 16))


def wide(*values):
    return pytest.param(*values, CASES, marks=pytest.mark.wide, id="-".join(values))


def _batches(dp_rank=0, dp_size=1):
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(4)]
    positions = torch.arange(16).expand(2, 16)
    return [{"tokens": part, "position_ids": positions, "attention_mask": None} for part in tokens[dp_rank::dp_size]]


def _facts(chunks):
    from nemo_opt.quantize.tensors import amax_by_name, quantizer_tensors
    from nemo_opt.training.logits import gather_logits

    scales = {key: tensor for key, tensor in quantizer_tensors(chunks) if tensor is not None and "pre_quant_scale" in key}
    logits = gather_logits(chunks, _batches()[0])
    return {"amax": amax_by_name(chunks), "scales": scales, "logits": logits, "maxima": _weight_maxima(chunks)}


def _weight_quantizers(model):
    """(name, linear, |weight|, its first quantizer) of every linear, and of every expert of a grouped one."""
    from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModule, SequentialQuantizer

    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if not isinstance(module, QuantModule) or quantizer is None:
            continue
        is_grouped = isinstance(quantizer, GroupedQuantizer)
        weights = [getattr(module, f"weight{i}") for i in range(len(quantizer))] if is_grouped else [module.weight]
        for index, (weight, own) in enumerate(zip(weights, quantizer if is_grouped else [quantizer], strict=True)):
            first = own[0] if isinstance(own, SequentialQuantizer) else own
            if first.is_enabled and first.amax is not None:
                yield f"{name}.{index}", module, weight.detach().abs(), first


def _weight_maxima(chunks):
    """name -> (amax of the weight itself, amax of its first quantizer) of this rank: an amax in the wrong row hardly moves the logits."""
    pairs = {}
    for name, module, weight, quantizer in _weight_quantizers(chunks[0]):
        amax = quantizer.amax.detach()
        if quantizer.block_sizes is None or quantizer.block_sizes.get("type") == "dynamic":
            maxima = weight.amax(dim=1) if amax.numel() > 1 else None  # one amax of all ranks is compared as a whole
        elif -2 in quantizer.block_sizes:
            maxima = weight.view(weight.shape[0] // 16, 16, -1, 16).amax(dim=(1, 3))
        else:
            maxima = weight.view(weight.shape[0], -1, 16).amax(dim=2)
        if maxima is not None:
            pairs[name] = (maxima.flatten(), amax.flatten(), bool(getattr(module, "_is_row_parallel", False)))
    return pairs


def _quantize(name, cases, folder=None, spec="te", model=SMALL):
    """The cases at one layout, in one start of the ranks."""
    from megatron.core import parallel_state

    from nemo_opt.data.batches import cp_slice
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.config import ExportConfig
    from nemo_opt.quantize.quantizer import Quantizer

    topology = initialize(Topology.from_name(name))
    loop = calibration_loop([cp_slice(batch) for batch in _batches(parallel_state.get_data_parallel_rank(), topology.dp)])
    results = {}
    for algorithm in cases:
        chunks = build_model(model, topology, spec=spec, seed=5)
        quantizer = Quantizer(config(algorithm), ExportConfig(path="unused", export_format="nemo"))
        quantizer.quantize(chunks, loop)
        if folder:
            quantizer.export(chunks, f"{folder}/{algorithm}")
        results[algorithm] = _facts(chunks)
    return results


@pytest.fixture(scope="module")
def single(ranks):
    return ranks(1).run(_quantize, "TP1PP1", CASES)[0]


@pytest.mark.ranks
@pytest.mark.wide
def test_every_algorithm_changes_the_logits(single):
    assert single.keys() == set(CASES)
    logits = [result["logits"] for result in single.values()]
    assert all(not torch.equal(one, other) for i, one in enumerate(logits) for other in logits[:i])
    assert all(result["scales"] for name, result in single.items() if name in SEARCHED)
    for name, result in single.items():
        assert all(torch.equal(maxima, amax) for maxima, amax, _ in result["maxima"].values()), name
        assert result["maxima"] or name in ("fp8", "nvfp4", "mxfp8")


@pytest.mark.ranks
@pytest.mark.wide
@pytest.mark.parametrize("layout", ["TP2PP1", "TP1PP2", "TP2PP2", "TP2PP1SP", "DP2", "CP2"])
def test_every_layout_gives_the_single_ranks_result(ranks, single, layout):
    for results in ranks(Topology.from_name(layout).world_size).run(_quantize, layout, CASES):
        for name, result in results.items():
            _assert_same(result, single[name], name, exact="TP2" not in layout and "CP2" not in layout)


def _assert_same(result, expected, name, *, exact):
    assert result["amax"].keys() == expected["amax"].keys()
    for kind in ("amax", "scales"):
        for key, value in result[kind].items():
            is_exact = exact or "weight_quantizer" in key
            rtol = SEARCH_TOLERANCE if name in SEARCHED else 0 if is_exact else TP_TOLERANCE
            torch.testing.assert_close(value, expected[kind][key], rtol=rtol, atol=0, msg=lambda text, key=key: f"{name} {key}: {text}")
    if result["logits"] is not None:
        atol = 0 if exact and name not in SEARCHED else LOGITS_TOLERANCE
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=0, atol=atol)


def _restore(name, cases, folder, spec="te"):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    return {algorithm: _facts(restore_model(f"{folder}/{algorithm}", topology, spec=spec)[0]) for algorithm in cases}


LAYOUTS = ("TP1PP1", "TP2PP1", "TP1PP2", "TP2PP2")


@pytest.fixture(scope="module")
def saved_at(ranks, tmp_path_factory):
    """`saved_at(layout, cases)`: rank 0's facts and the folder of checkpoints, made once for each."""
    made = {}

    def get(layout, cases):
        if (layout, cases) not in made:
            folder = str(tmp_path_factory.mktemp(layout))
            made[layout, cases] = ranks(Topology.from_name(layout).world_size).run(_quantize, layout, cases, folder)[0], folder
        return made[layout, cases]

    return get


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("saved", "loaded", "cases"),
    [
        ("TP2PP1", "TP1PP1", FEW),
        *(wide(saved, loaded) for saved in LAYOUTS for loaded in LAYOUTS if saved != loaded),
    ],
)
def test_every_amax_finds_its_place_at_another_layout(ranks, saved_at, saved, loaded, cases):
    before, folder = saved_at(saved, cases)
    for results in ranks(Topology.from_name(loaded).world_size).run(_restore, loaded, cases, folder):
        for name, after in results.items():
            assert after["amax"].keys() == before[name]["amax"].keys()
            assert all(torch.equal(after["amax"][key], amax) for key, amax in before[name]["amax"].items())
            assert all(torch.equal(after["scales"][key], scale) for key, scale in before[name]["scales"].items() if after["scales"])
            for key, (maxima, amax, is_row_parallel) in after["maxima"].items():
                if not is_row_parallel or maxima.numel() != amax.numel() or name in ("int4", "int4_awq", "w4a8_awq", "block_fp8"):
                    assert torch.equal(maxima, amax), (name, key)
            if after["logits"] is not None:
                torch.testing.assert_close(after["logits"], before[name]["logits"], rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "spec", "cases"),
    [
        ("EP2", "te", ("int8",)),
        pytest.param("EP2", "te", MAX_CALIBRATED, marks=pytest.mark.wide),
        pytest.param("EP2", "local", MAX_CALIBRATED, marks=pytest.mark.wide),
        pytest.param("TP2PP1", "te", MAX_CALIBRATED, marks=pytest.mark.wide),
    ],
)
def test_experts_have_the_single_ranks_amax_and_keep_it_at_another_layout(ranks, tmp_path, layout, spec, cases):
    (single,) = ranks(1).run(_quantize, "TP1PP1", cases, None, spec, EXPERTS)
    for results in ranks(2).run(_quantize, layout, cases, str(tmp_path), spec, EXPERTS):
        for name, result in results.items():
            assert sum(".experts." in key and "weight_quantizer" in key for key in result["amax"]) in (0 if name == "mxfp8" else 8,)
            _assert_same(result, single[name], name, exact=layout == "EP2")
    (loaded,) = ranks(1).run(_restore, "TP1PP1", cases, str(tmp_path), spec)
    for name, after in loaded.items():
        _assert_same(after, single[name], name, exact=layout == "EP2")
