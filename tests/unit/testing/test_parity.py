"""The parity oracle must catch every kind of difference, and every layout must pass it."""

import math
from dataclasses import replace

import pytest
import torch

from nemo_opt.testing import parity
from nemo_opt.testing.parity import TINY, TINY_MOE, Measurement, ParityError, Piece, TrainingCase, compare


def _whole(key, tensor):
    return Piece(key=key, global_shape=tuple(tensor.shape), offset=(0,) * tensor.dim(), tensor=tensor)


@pytest.fixture
def reference():
    generator = torch.Generator().manual_seed(0)
    return Measurement(numbers={"loss": 4.5}, pieces=[_whole(k, torch.randn(4, 6, generator=generator)) for k in ("a", "b")])


def _split(reference):
    """Two ranks that hold the upper and the lower half of everything."""
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        pieces = [replace(p, offset=(rows.start, 0), tensor=p.tensor[rows].clone()) for p in reference.pieces]
        halves.append(Measurement(numbers=dict(reference.numbers), pieces=pieces))
    return halves


def test_shards_of_the_reference_agree_with_it(reference):
    assert compare(reference, _split(reference)) == 0.0


def test_difference_below_the_tolerance_is_reported_as_a_number(reference):
    ranks = _split(reference)
    ranks[0].pieces[0].tensor[0, 0] += 1e-6 * reference.pieces[0].tensor.abs().max()
    assert compare(reference, ranks, tol_rel=1e-5) == pytest.approx(1e-6, rel=0.1)


def test_one_changed_entry_names_tensor_place_and_size(reference):
    ranks = _split(reference)
    ranks[1].pieces[1].tensor[1, 4] += 1.0
    with pytest.raises(ParityError, match=r"TP2, rank 1: b \(4, 6\) differs first at \(3, 4\): .* 1 of 12 entries, largest 0\.\d+ > 1e-05"):
        compare(reference, ranks, name="TP2")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_differs(reference, value):
    ranks = _split(reference)
    ranks[0].pieces[0].tensor[1, 1] = value
    with pytest.raises(ParityError, match=r"rank 0: a .* at \(1, 1\): (nan|inf)"):
        compare(reference, ranks)


def test_shifted_rows_differ(reference):
    ranks = _split(reference)
    ranks[0].pieces[0] = replace(ranks[0].pieces[0], tensor=ranks[0].pieces[0].tensor.roll(1, dims=0))
    with pytest.raises(ParityError, match="rank 0: a"):
        compare(reference, ranks)


def test_swapped_ranks_differ(reference):
    first, second = _split(reference)
    first.pieces[0], second.pieces[0] = (
        replace(first.pieces[0], tensor=second.pieces[0].tensor),
        replace(second.pieces[0], tensor=first.pieces[0].tensor),
    )
    with pytest.raises(ParityError, match="rank 0: a"):
        compare(reference, [first, second])


def test_a_wrong_replica_is_caught_though_the_first_one_is_right(reference):
    ranks = [
        Measurement(numbers=dict(reference.numbers), pieces=[replace(p, tensor=p.tensor.clone()) for p in reference.pieces]) for _ in "12"
    ]
    ranks[1].pieces[0].tensor[0, 0] *= 2
    with pytest.raises(ParityError, match="rank 1: a"):
        compare(reference, ranks)


def test_missing_rows_are_caught(reference):
    with pytest.raises(ParityError, match=r"no rank holds a at \(2, 0\); 2 of 2 tensors are incomplete"):
        compare(reference, _split(reference)[:1])


def test_a_missing_tensor_is_caught(reference):
    ranks = _split(reference)
    for rank in ranks:
        del rank.pieces[1]
    with pytest.raises(ParityError, match="no rank holds b"):
        compare(reference, ranks)


def test_an_unknown_tensor_is_caught(reference):
    ranks = _split(reference)
    ranks[0].pieces[0] = replace(ranks[0].pieces[0], key="c")
    with pytest.raises(ParityError, match="c is not in the reference, which holds 2 tensors"):
        compare(reference, ranks)


def test_another_shape_is_caught(reference):
    ranks = _split(reference)
    ranks[0].pieces[0] = replace(ranks[0].pieces[0], global_shape=(8, 6))
    with pytest.raises(ParityError, match=r"shape \(8, 6\), the reference \(4, 6\)"):
        compare(reference, ranks)


def test_a_piece_outside_the_whole_is_caught(reference):
    ranks = _split(reference)
    ranks[0].pieces[0] = replace(ranks[0].pieces[0], offset=(3, 0))
    with pytest.raises(ParityError, match="lies outside"):
        compare(reference, ranks)


@pytest.mark.parametrize("loss", [4.6, math.nan])
def test_another_loss_is_caught(reference, loss):
    ranks = _split(reference)
    ranks[1].numbers["loss"] = loss
    with pytest.raises(ParityError, match="rank 1: loss is"):
        compare(reference, ranks)


def test_a_missing_number_is_caught(reference):
    ranks = _split(reference)
    del ranks[1].numbers["loss"]
    with pytest.raises(ParityError, match=r"\['loss'\] on one side only"):
        compare(reference, ranks)


def test_comparisons_that_prove_nothing_are_refused(reference):
    with pytest.raises(ParityError, match="nothing to compare"):
        compare(reference, [])
    with pytest.raises(ParityError, match="nothing to compare"):
        compare(replace(reference, pieces=[]), _split(reference))
    with pytest.raises(ParityError, match="all zero"):
        compare(replace(reference, pieces=[_whole("a", torch.zeros(4, 6))]), _split(reference))
    with pytest.raises(ParityError, match="not finite"):
        compare(replace(reference, pieces=[_whole("a", torch.full((4, 6), math.nan))]), _split(reference))
    with pytest.raises(ParityError, match="in parts"):
        compare(_split(reference)[0], _split(reference))


# Every layout against the local spec on one rank: this also holds the two specs against each other.
DENSE = ["TP2PP1", "TP1PP2", "TP2PP2", "TP1PP2VP2", "TP2PP1SP", "TP1PP1DP2"]
CASES = [
    TrainingCase(spec="te"),
    *[TrainingCase(layout=layout, spec=spec) for layout in DENSE for spec in ("local", "te")],
    TrainingCase(layout="TP1PP1CP2", spec="te"),  # Megatron-Core's local attention knows no context parallelism
    TrainingCase(spec="te", model=TINY_MOE),
    *[TrainingCase(layout="TP1PP1EP2", spec=spec, model=TINY_MOE) for spec in ("local", "te")],
    *[TrainingCase(layout="TP2PP1EP2SP", spec=spec, model=TINY_MOE) for spec in ("local", "te")],
    TrainingCase(layout="TP2PP1CP2SP", spec="te"),
    TrainingCase(layout="TP1PP2FIRST1", spec="te"),
    TrainingCase(layout="TP1PP1DP2", spec="te", micro_batch_size=2),
    *[TrainingCase(layout="TP1PP2", spec=spec, model=TINY.with_(tie_embeddings=True)) for spec in ("local", "te")],
]
NARROW = {  # one of each axis, and each spec; the others are left to the functional suite: see tests/unit/conftest.py
    ("TP1PP1", "te"),
    ("TP2PP1", "local"),
    ("TP1PP2", "te"),
    ("TP1PP2VP2", "local"),
    ("TP2PP1SP", "te"),
    ("TP1PP1DP2", "local"),
    ("TP1PP1CP2", "te"),
    ("TP1PP1EP2", "te"),
}


@pytest.fixture(scope="module")
def references(ranks):
    """Measurements of the local spec on one rank, by model."""
    found = {}

    def reference(model):
        if model not in found:
            [found[model]] = ranks(1).run(parity.measure, TrainingCase(model=model))
        return found[model]

    return reference


def _id(case):
    size = f"-B{case.micro_batch_size}" if case.micro_batch_size > 1 else ""
    return f"{case.layout}-{case.spec}{size}{'-moe' if case.model.num_moe_experts else ''}{'-tied' if case.model.tie_embeddings else ''}"


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=_id(case), marks=[] if (case.layout, case.spec) in NARROW else pytest.mark.wide) for case in CASES]
)
def test_loss_and_every_gradient_equal_those_of_one_rank(ranks, references, case, record_property):
    worst = parity.require_parity(ranks, case, reference=references(case.model))
    record_property("largest relative difference", worst)
    print(_id(case), worst)


@pytest.mark.ranks
def test_the_oracle_sees_other_weights(ranks, references):
    with pytest.raises(ParityError, match="loss is"):
        parity.require_parity(ranks, TrainingCase(layout="TP2PP1", seed=8), reference=references(TINY))


@pytest.mark.ranks
def test_the_oracle_sees_messages_that_were_matched_crosswise(ranks, references):
    """Megatron-Core takes this setting at pp 2 and trains on gradients in the place of activations; see models/build.py."""
    case = TrainingCase(layout="TP1PP2VP2", overrides={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    with pytest.raises(ParityError, match="loss is"):
        parity.require_parity(ranks, case, reference=references(TINY))


def _without_the_sum_over_sequence_parallel_ranks(case):
    from unittest.mock import patch

    with patch("megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads"):
        return case.measure()


@pytest.mark.ranks
def test_the_oracle_sees_a_sum_that_was_left_out(ranks, references):
    case = TrainingCase(layout="TP2PP1SP")
    measurements = ranks(2).run(_without_the_sum_over_sequence_parallel_ranks, case)
    with pytest.raises(ParityError, match=r"rank 0: decoder\.final_layernorm\.weight"):
        compare(references(TINY), measurements)
