"""SQNR against sums taken by hand, against theory, and at several layouts; bits per weight against counts by hand."""

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology

SMALL = preset(
    "tiny",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)
MOE = SMALL.with_(num_moe_experts=2)
CASES = ["fp8", "int8", "int4", "block_fp8", "nvfp4", "w4a8_awq"]
DB_TOLERANCE = 1e-4
"""Decibels, of activations: at TP2 they differ in the last bit (1e-7), and one that lies next to a rounding edge goes to the other side:
one of some 10,000 values then has another error. 3.4e-6 dB seen. Weights are the same values whoever holds them: 1e-14 seen, and 1e-9
allowed."""


def _batches(dp_rank=0, dp_size=1):
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(4)]
    positions = torch.arange(16).expand(2, 16)
    return [{"tokens": part, "position_ids": positions, "attention_mask": None} for part in tokens[dp_rank::dp_size]]


def _measure(name, cases, model=SMALL, spec="te"):
    """Of each case at one layout: rounding of weights and of activations, bits; and on one rank what they should be, by hand."""
    from megatron.core import parallel_state

    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.bits import bits_per_weight
    from nemo_opt.quantize.config import QuantizationConfig
    from nemo_opt.quantize.quantizer import Quantizer
    from nemo_opt.quantize.sqnr import measure_activations, weight_rounding
    from nemo_opt.quantize.tensors import amax_by_name, quantizer_settings
    from nemo_opt.training.forward import forward_loop

    topology = initialize(Topology.from_name(name), model=model)
    loop = forward_loop(_batches(parallel_state.get_data_parallel_rank(), topology.dp), description="")
    results = {}
    for case in cases:
        chunks = build_model(model, topology, spec=spec, seed=5)
        Quantizer(QuantizationConfig(algorithm=case, awq_block_size=16, fp8_block_shape=(8, 16))).quantize(chunks, loop)
        chunks[0].eval()
        with measure_activations(chunks) as meter:
            loop(chunks[0])
        loop(chunks[0])  # not seen by the meter any more
        results[case] = SimpleNamespace(
            weights=weight_rounding(chunks),
            activations=meter.results(),
            bits=bits_per_weight(chunks),
            by_hand=_by_hand(chunks[0]),
            settings=quantizer_settings(chunks),
            amax=amax_by_name(chunks),
        )
    return results


def _by_hand(model):
    """SQNR of the first layer's MLP output weight, from its row or tensor maxima alone."""
    linear = model.decoder.layers[0].mlp.linear_fc2 if hasattr(model.decoder.layers[0].mlp, "linear_fc2") else None
    if linear is None or getattr(linear.weight_quantizer, "num_bits", None) != 8:
        return None
    weight = linear.weight.detach().double()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    noise = weight - (weight / step).round() * step
    return 10 * math.log10(float(weight.square().sum() / noise.square().sum()))


@pytest.fixture(scope="module")
def single(ranks):
    return ranks(1).run(_measure, "TP1PP1", CASES)[0]


@pytest.mark.ranks
def test_weights_of_one_rank(single):
    linears = [f"decoder.layers.{n}.{part}.weight_quantizer" for n in (0, 1) for part in (
        "mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")]  # fmt: skip
    for case in CASES:
        assert sorted(single[case].weights) == linears
        assert set(single[case].bits.by_name) == set(linears)
    int8 = single["int8"].weights["decoder.layers.0.mlp.linear_fc2.weight_quantizer"]
    assert int8.sqnr_db == pytest.approx(single["int8"].by_hand, abs=1e-3)  # ModelOpt divides by step in float32
    # Normal weights in 127 steps to a row's maximum (2-3 sigma in 64 columns): 6.02 * 8 + 4.77 - 20 log10(max / sigma) = 44-47 dB.
    assert 40 < int8.sqnr_db < 48
    means = {case: sum(r.sqnr_db for r in single[case].weights.values()) / len(linears) for case in CASES}
    assert 14 < means["int4"] < 24 < 30 < means["fp8"] < 34, "three bits of mantissa lose 31.5 dB, four-bit integers about 20"
    assert 30 < means["block_fp8"] < 34
    assert 19 < means["nvfp4"] < 22
    assert means["int4"] - 1 < means["w4a8_awq"] < means["int4"] + 1, "FP8 of what is an integer of four bits hardly loses anything more"


@pytest.mark.ranks
def test_activations_of_one_rank(single):
    kinds = {name.split(".")[-1] for name in single["fp8"].activations}
    assert kinds == {"input_quantizer", "k_bmm_quantizer", "v_bmm_quantizer"}
    assert len(single["fp8"].activations) == 2 * 4 + 2 * 2
    assert {name.split(".")[-1] for name in single["int4"].activations} == {"k_bmm_quantizer", "v_bmm_quantizer"}, "weights only"
    for rounding in single["fp8"].activations.values():
        assert 28 < rounding.sqnr_db < 36
        assert rounding.amax > 0


@pytest.mark.ranks
def test_bits_of_one_rank(single):
    layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 64
    parameters = 2 * 128 * 32 + 2 * (layer + 2 * 32) + 32
    bits = {case: single[case].bits for case in CASES}
    name = "decoder.layers.1.mlp.linear_fc1.weight_quantizer"
    assert bits["fp8"].by_name[name] == 8 + 32 / (2 * 64 * 32)
    assert bits["int8"].by_name[name] == 8 + 32 / 32, "one scale for each row of 32"
    assert bits["int4"].by_name[name] == 4 + 16 / 16
    assert bits["block_fp8"].by_name[name] == 8 + 32 / (8 * 16)
    assert [bits[case].block for case in CASES] == ["", "", "16", "8x16", "16", "16"]
    assert bits["nvfp4"].by_name[name] == 4 + 8 / 16 + 32 / (2 * 64 * 32)
    assert bits["w4a8_awq"].by_name[name] == 4 + 16 / 16 + 32 / (2 * 64 * 32), "the narrower of two formats, scales of both"
    assert bits["int4"].quantized == 5
    assert bits["int4"].model == pytest.approx((5 * 2 * layer + 16 * (parameters - 2 * layer)) / parameters)


@pytest.mark.ranks
@pytest.mark.wide
@pytest.mark.parametrize("layout", ["TP2PP1", "TP1PP2", "TP2PP2", "DP2", "TP2PP1SP"])
def test_every_layout_gives_the_single_ranks_numbers(ranks, single, layout):
    for results in ranks(Topology.from_name(layout).world_size).run(_measure, layout, CASES):
        for case, result in results.items():
            assert result.bits == single[case].bits
            exact = DB_TOLERANCE if "awq" in case else 1e-9  # AWQ's scales come from activations
            for kind, tolerance in (("weights", exact), ("activations", DB_TOLERANCE)):
                measured, expected = getattr(result, kind), getattr(single[case], kind)
                assert measured.keys() == expected.keys()
                for name, rounding in measured.items():
                    assert rounding.sqnr_db == pytest.approx(expected[name].sqnr_db, abs=tolerance), f"{case} {name}"
                    assert rounding.amax == pytest.approx(expected[name].amax, rel=5e-7), f"{case} {name}"  # as in test_tensors


@pytest.mark.ranks
@pytest.mark.wide
def test_experts_have_the_same_names_and_numbers_at_every_layout_and_spec(ranks):
    te, local, spread = (
        ranks(size).run(_measure, layout, ["int8"], MOE, spec)[0]["int8"]
        for size, layout, spec in ((1, "TP1PP1", "te"), (1, "TP1PP1", "local"), (2, "EP2", "te"))
    )
    experts = [name for name in te.weights if "experts" in name]
    assert len(experts) == 2 * 2 * 2
    assert "decoder.layers.1.mlp.experts.experts.1.linear_fc2.weight_quantizer" in experts
    for other in (local, spread):
        assert other.weights.keys() == te.weights.keys()
        for name, rounding in other.weights.items():
            assert rounding.sqnr_db == pytest.approx(te.weights[name].sqnr_db, abs=1e-9), name
        assert other.bits == te.bits
    assert all(set(result.settings) == set(result.amax) for result in (te, local, spread)), "one naming for everything"


def rounding_of(*parts):
    """What one quantizer's sums on several ranks come to."""
    from nemo_opt.quantize import sqnr

    def gather(out, own):
        out[:] = [{"q": part} for part in parts]

    with patch.object(sqnr.dist, "get_world_size", lambda: len(parts)), patch.object(sqnr.dist, "all_gather_object", gather):
        return sqnr.ActivationMeter().results()["q"]


@pytest.mark.parametrize(
    ("parts", "db", "amax"),
    [
        ([(100.0, 1.0, 2.0)], 20.0, 2.0),
        ([(100.0, 1.0, 2.0), (900.0, 9.0, 3.0)], 20.0, 3.0),  # parts add up
        ([(100.0, 1.0, 2.0)] * 3, 20.0, 2.0),  # copies change nothing
        ([(100.0, 0.0, None)], None, None),  # nothing is lost
        ([(0.0, 0.0, 0.0)], None, 0.0),  # all values are zero
    ],
)
def test_sums_over_ranks(parts, db, amax):
    rounding = rounding_of(*parts)
    assert (rounding.sqnr_db, rounding.amax) == (pytest.approx(db), amax)


def level(num_bits, block_sizes=None):
    return SimpleNamespace(num_bits=num_bits, block_sizes=block_sizes)


@pytest.mark.parametrize(
    ("quantizer", "scales", "bits"),
    [
        (level((4, 3)), 1, 8 + 32 / 4096),
        (level(8), 64, 8 + 32 / 64),
        (level(4, {-1: 128, "type": "static"}), 32, 4.125),
        (level((4, 3), {-1: 128, -2: 32}), 1, 8 + 32 / 4096),
        (level((2, 1), {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}), 1, 4.5 + 32 / 4096),
        (level((4, 3), {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}), 0, 8.25),
    ],
)
def test_bits_of_formats(quantizer, scales, bits):
    """Of a weight of 4096 elements, 64 rows of 64."""
    from nemo_opt.quantize.bits import _bits, _format

    assert _bits("w", 4096, {"w._amax": scales, "w.1._amax": 7}, _format(quantizer)) / 4096 == pytest.approx(bits)


def test_two_formats_in_sequence_count_as_the_narrower():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    from nemo_opt.quantize.bits import _bits, _elements, _format

    attributes = ({"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}, {"num_bits": (4, 3)})
    form = _format(SequentialQuantizer(*(TensorQuantizer(QuantizerAttributeConfig(**a)) for a in attributes)))
    assert (form.element_bits, form.block) == (4, "64")
    scales = {"w.0._amax_w": 24, "w.0._amax_v": 24, "w.1._amax": 1, "w._amax": 7, "v.0._amax": 9}
    assert _elements(scales, "w.0._amax") == 48
    assert _bits("w", 3072, scales, form) == 3072 * 4 + 48 * 16 + 32, "block scales of 16 bits, and one of 32 for the tensor"


class _Layer(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer_number = number
        self.linear_fc1 = torch.nn.Linear(8, 4, bias=False)
        self.linear_fc2 = torch.nn.Linear(4, 8, bias=False)

    def forward(self, x):
        return self.linear_fc2(self.linear_fc1(x))


class _Stage(torch.nn.Module):
    """The third and fourth layer of a model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([_Layer(3), _Layer(4)])
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.decoder.layers[1](self.decoder.layers[0](x))


@pytest.fixture
def stage():
    """Two layers in INT8, the first one's fc2 in INT4 and then FP8, the second one's fc2 not at all; no ranks."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.quantize import sqnr, tensors

    in_sequence = [{"num_bits": 4, "block_sizes": {-1: 4, "type": "static"}}, {"num_bits": (4, 3)}]
    more = [
        {"quantizer_name": "*layers.0.linear_fc2.weight_quantizer", "cfg": in_sequence},
        {"quantizer_name": "*layers.1.linear_fc2.*", "enable": False},
    ]
    model = _Stage()
    model.x = torch.randn(6, 8, dtype=torch.bfloat16)
    mtq.quantize(model, {"quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *more], "algorithm": "max"}, lambda model: model(model.x))
    with (
        patch.object(sqnr, "unwrap", lambda chunk: chunk),
        patch.object(tensors, "unwrap", lambda chunk: chunk),
        patch.object(sqnr.dist, "get_world_size", lambda: 1),
        patch.object(sqnr.dist, "all_gather_object", lambda everyone, own: everyone.__setitem__(0, own)),
    ):
        yield model


def _db(x, rounded):
    x, rounded = x.double(), rounded.double()
    return 10 * math.log10(x.pow(2).sum() / (x - rounded).pow(2).sum())


def test_every_quantised_weight_has_its_global_name(stage):
    from nemo_opt.quantize.sqnr import weight_rounding

    rounding = weight_rounding([stage])
    linears = {f"decoder.layers.{2 + i}.{name}": layer.get_submodule(name) for i, layer in enumerate(stage.decoder.layers) for name in FCS}
    del linears["decoder.layers.3.linear_fc2"]
    assert list(rounding) == [f"{name}.weight_quantizer" for name in sorted(linears)]
    for name, linear in linears.items():
        found, weight = rounding[f"{name}.weight_quantizer"], linear.weight.detach()
        assert found.sqnr_db == pytest.approx(_db(weight, linear.weight_quantizer(weight)), abs=1e-9)
        assert found.amax == float(weight.abs().max())


FCS = ("linear_fc1", "linear_fc2")


def test_chunks_of_one_rank_add_to_one_result(stage):
    from nemo_opt.quantize.sqnr import weight_rounding

    assert weight_rounding([stage, stage]) == weight_rounding([stage]), "the same names: twice the signal, twice the noise"


def test_activations_that_pass_are_measured_and_then_no_more(stage):
    from nemo_opt.quantize.sqnr import measure_activations

    fc1 = stage.decoder.layers[0].linear_fc1
    fc1.input_quantizer.pre_quant_scale = torch.linspace(0.5, 1, 8).bfloat16()
    parts = [stage.x[:2], stage.x[2:], stage.x[:0]]
    with measure_activations([stage]) as meter:
        for part in parts:
            stage(part)
    stage(100 * stage.x)
    results = meter.results()
    names = ["decoder.layers.2.linear_fc1", "decoder.layers.2.linear_fc2", "decoder.layers.3.linear_fc1"]
    assert list(results) == [f"{name}.input_quantizer" for name in names]
    found = results["decoder.layers.2.linear_fc1.input_quantizer"]
    scaled = stage.x * fc1.input_quantizer.pre_quant_scale
    assert found.sqnr_db == pytest.approx(_db(scaled, fc1.input_quantizer(stage.x).detach()), abs=1e-9)
    assert found.amax == float(stage.x.abs().max())
    assert not any(module._forward_hooks for module in stage.modules())


def test_watching_ends_when_a_pass_fails(stage):
    from nemo_opt.quantize.sqnr import measure_activations

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), measure_activations([stage]):
        stage(stage.x[:, :3])
    assert not any(module._forward_hooks for module in stage.modules())


def test_weights_of_grouped_linears_have_a_quantizer_each():
    """Transformer Engine holds a rank's experts in one module, its weights by number."""
    from modelopt.torch.quantization.nn import GroupedQuantizer, TensorQuantizer

    from nemo_opt.quantize import sqnr

    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_quantizer = GroupedQuantizer(TensorQuantizer(), TensorQuantizer(), TensorQuantizer())
            self.weight_quantizer[1].disable()

        def iter_weights_for_calibration(self):
            return zip("abc", self.weight_quantizer, strict=True)

    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.local_expert_indices = [4, 5, 6]
    model.mlp.experts = torch.nn.Module()
    model.mlp.experts.linear_fc1 = Grouped()
    with patch.object(sqnr, "unwrap", lambda chunk: chunk), patch.object(sqnr, "QuantModule", Grouped):
        found = [(name, weight) for name, weight, _ in sqnr.quantized_weights([model])]
    assert found == [(f"mlp.experts.experts.{number}.linear_fc1.weight_quantizer", weight) for number, weight in ((4, "a"), (6, "c"))]


def test_results_differ_by_rank_in_names_too():
    from nemo_opt.quantize import sqnr

    def gather(everyone, own):
        everyone[:] = [{"b": (100.0, 1.0, 1.0)}, {"a": (0.0, 1.0, None), "b": (0.0, 0.0, 3.0)}]

    with patch.object(sqnr.dist, "get_world_size", lambda: 2), patch.object(sqnr.dist, "all_gather_object", gather):
        results = sqnr.ActivationMeter().results()
    assert list(results) == ["a", "b"]
    assert (results["b"].sqnr_db, results["b"].amax) == (pytest.approx(20), 3)
    assert (results["a"].sqnr_db, results["a"].amax) == (None, None)
    with pytest.raises(AttributeError):
        results["a"].amax = 1


def test_squares_are_summed_in_float64():
    from nemo_opt.quantize import sqnr

    values = torch.full((1 << 12,), 1 + 2**-12)
    assert sqnr._square(values) == pytest.approx((1 << 12) * (1 + 2**-12) ** 2, rel=1e-12)
    sums = sqnr._Sums()
    sqnr._add(sums, torch.tensor([3.0, 4.0], dtype=torch.bfloat16), torch.tensor([3.0078125, 4.0]))
    assert (sums.signal, sums.noise) == (pytest.approx(25), pytest.approx(0.0078125**2))
