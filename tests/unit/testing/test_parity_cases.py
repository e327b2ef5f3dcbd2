"""Quantisation, pruning and distillation at any layout equal one rank's; and the oracle sees what goes wrong in each."""

import math
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest

from nemo_opt.prune.selection import Kept, KeptLayer
from nemo_opt.testing import parity_cases
from nemo_opt.testing.parity import TINY, TINY_MOE, Measurement, ParityError, compare, measure, require_parity
from nemo_opt.testing.parity_cases import DistillationCase, PruningCase, QuantizationCase, kept_pieces

EXPERTS = PruningCase().model.with_(num_moe_experts=4)
QUANTIZED = [
    QuantizationCase(layout="TP2PP1", algorithm="int8_sq"),
    QuantizationCase(layout="TP1PP2"),
    *[
        pytest.param(QuantizationCase(layout=layout, spec=spec, algorithm=algorithm), marks=pytest.mark.wide)
        for algorithm in ("fp8", "int8", "int4", "w4a8_awq")
        for layout, spec in (("TP2PP2", "te"), ("TP2PP1SP", "local"), ("DP2", "te"), ("CP2", "te"))
    ],
    pytest.param(QuantizationCase(layout="EP2", spec="te", algorithm="int8", model=TINY_MOE), marks=pytest.mark.wide),
]
PRUNED = [
    PruningCase(layout="TP1PP2", spec="te"),
    *[pytest.param(PruningCase(layout=layout), marks=pytest.mark.wide) for layout in ("TP2PP1", "TP2PP2", "DP2", "TP2PP1SP")],
    pytest.param(
        PruningCase(layout="EP2", spec="te", model=EXPERTS, targets={**PruningCase().targets, "num_moe_experts": 2}), marks=pytest.mark.wide
    ),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", [*QUANTIZED, *PRUNED], ids=lambda case: "-".join([getattr(case, "algorithm", "prune"), case.layout, case.spec])
)
def test_a_layout_equals_one_rank(ranks, case, record_property):
    worst = require_parity(ranks, case)
    record_property("largest relative difference", worst)


@pytest.fixture(scope="module")
def quantized(ranks):
    """One rank's measurement, and those of two tensor parallel ranks."""
    case = QuantizationCase(algorithm="int8")
    return ranks(1).run(measure, case)[0], ranks(2).run(measure, case.at("TP2PP1"))


def _with(measurement, key, tensor=None):
    """The measurement with another tensor under `key`, or without it."""
    pieces = [replace(p, tensor=tensor) if p.key == key and tensor is not None else p for p in measurement.pieces]
    return replace(measurement, pieces=[p for p in pieces if p.key != key or tensor is not None])


KEY = "decoder.layers.1.mlp.linear_fc1.weight_quantizer._amax_v"


def _amax(measurement):
    return next(piece.tensor for piece in measurement.pieces if piece.key == KEY)


@pytest.mark.ranks
class TestAmax:
    """Of one row of a weight each, on two ranks."""

    def test_two_channels_that_are_swapped(self, quantized):
        reference, (first, second) = quantized
        swapped = _amax(second)[[0, 1, 3, 2, *range(4, len(_amax(second)))]]
        place = len(swapped) + 2
        with pytest.raises(ParityError, match=rf"rank 1: {KEY} .* differs first at \({place}, 0\).*; 2 of "):
            compare(reference, [first, _with(second, KEY, swapped)], tol_rel=1e-6)

    def test_two_shards_that_are_swapped(self, quantized):
        reference, (first, second) = quantized
        swapped = [_with(first, KEY, _amax(second)), _with(second, KEY, _amax(first))]
        with pytest.raises(ParityError, match=rf"rank 0: {KEY} .* differs first at \(0, 0\)"):
            compare(reference, swapped, tol_rel=1e-6)

    def test_gate_and_up_rows_that_are_swapped(self, quantized):
        reference, (first, second) = quantized
        gate = KEY.removesuffix("_v") + "_w"
        pieces = [replace(p, key={KEY: gate, gate: KEY}.get(p.key, p.key)) for p in second.pieces]
        with pytest.raises(ParityError, match=r"rank 1: .*linear_fc1\.weight_quantizer\._amax_[vw]"):
            compare(reference, [first, replace(second, pieces=pieces)], tol_rel=1e-6)

    def test_one_that_is_not_a_number(self, quantized):
        reference, (first, second) = quantized
        broken = _amax(second).clone()
        broken[5] = math.nan
        with pytest.raises(ParityError, match=rf"rank 1: {KEY} .*: nan, the reference"):
            compare(reference, [first, _with(second, KEY, broken)], tol_rel=1e-6)

    def test_one_that_is_missing(self, quantized):
        reference, (first, second) = quantized
        with pytest.raises(ParityError, match=f"no rank holds {KEY}"):
            compare(reference, [first, _with(second, KEY)], tol_rel=1e-6)

    def test_none_at_all(self, quantized):
        reference, split = quantized
        with pytest.raises(ParityError, match=r"nothing to compare \(0 reference tensors, 2 ranks\)"):
            compare(replace(reference, pieces=[]), split)

    def test_a_quantizer_too_few(self, quantized):
        reference, (first, second) = quantized
        fewer = {name: count - 1 for name, count in second.numbers.items()}
        with pytest.raises(ParityError, match="rank 1: enabled quantizers is"):
            compare(reference, [first, replace(second, numbers=fewer)])


@pytest.mark.ranks
def test_an_algorithm_without_amax_is_nothing_to_compare(ranks):
    """Its scales are made from the data of each call."""
    with pytest.raises(ParityError, match="nothing to compare"):
        require_parity(ranks, QuantizationCase(algorithm="mxfp8", layout="TP1PP1"))


LAYER = KeptLayer(heads=[0, 3], groups=[0, 1], ffn=[[1, 2, 5]])
KEPT = Kept(hidden=[0, 2], layers={1: LAYER, 3: LAYER})


def _kept(kept):
    return Measurement(numbers={"tokens": 64.0}, pieces=kept_pieces(kept, TINY))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (replace(KEPT, layers={2: LAYER, 3: LAYER}), r"kept\.layers \(4,\) differs first at \(0,\): 0\.0, the reference 1\.0; 2 of 4"),
        (replace(KEPT, layers={0: LAYER, 2: LAYER}), r"kept\.layers"),
        (replace(KEPT, layers={1: LAYER}), r"kept\.layers \(4,\) differs first at \(2,\)"),
        (replace(KEPT, hidden=[1, 3]), r"kept\.hidden \(32,\) differs first at \(0,\)"),
        (replace(KEPT, layers={1: LAYER, 3: replace(LAYER, heads=[1, 3])}), r"kept\.layer3\.heads \(4,\) differs first at \(0,\)"),
        (replace(KEPT, layers={1: replace(LAYER, ffn=[[1, 2, 6]]), 3: LAYER}), r"kept\.layer1\.ffn0 \(48,\) differs first at \(5,\)"),
    ],
    ids=["a layer too late", "all layers too early", "a layer less", "other channels", "another head", "another channel of the MLP"],
)
def test_other_indices_are_caught(kept, message):
    assert compare(_kept(KEPT), [_kept(KEPT)], tol_rel=0.0) == 0.0
    with pytest.raises(ParityError, match=f"rank 1: {message}"):
        compare(_kept(KEPT), [_kept(KEPT), _kept(kept)], tol_rel=0.0)


@dataclass(frozen=True, kw_only=True)
class OffByOne(PruningCase):
    """The last rank prunes the layers before those that it should."""

    def measure(self):
        import torch.distributed as dist

        from nemo_opt.prune import selection

        def shifted(scores, targets):
            offset = int(dist.get_rank() > 0)
            return selection.select(replace(scores, layers=scores.layers.roll(-offset)), targets)

        with patch.object(parity_cases, "select", shifted):
            return super().measure()


@pytest.mark.ranks
def test_a_rank_that_prunes_other_layers_is_named(ranks):
    with pytest.raises(ParityError, match=r"OffByOne TP1PP2 \(local\), rank 1: kept\.layer"):
        require_parity(ranks, OffByOne(layout="TP1PP2"))


@dataclass(frozen=True, kw_only=True)
class OneWrongGradient(DistillationCase):
    """On the second rank one gradient is twice as large."""

    def measure(self):
        import torch.distributed as dist

        measurement = super().measure()
        if dist.get_rank() == 1:
            [wrong] = [piece for piece in measurement.pieces if piece.key == "decoder.layers.3.mlp.linear_fc2.weight"]
            wrong.tensor.mul_(2)
        return measurement


@pytest.mark.ranks
def test_a_wrong_gradient_on_one_rank_is_named(ranks):
    with pytest.raises(ParityError, match=r"rank 1: decoder\.layers\.3\.mlp\.linear_fc2\.weight \(32, 48\) differs first at \(0, 0\)"):
        require_parity(ranks, OneWrongGradient(layout="TP1PP2"))
