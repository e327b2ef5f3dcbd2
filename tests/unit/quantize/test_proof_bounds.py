"""What a proof allows: pinned, since a bound that grows lets wrong files through without a test turning red."""

from types import SimpleNamespace

import pytest
import torch

from nemo_opt.errors import CheckpointError
from nemo_opt.quantize import proof
from nemo_opt.quantize.export.formats import Kind
from nemo_opt.quantize.proof import random_batches

LOGITS = {Kind.FP8: 3e-3, Kind.MXFP8: 3e-3, Kind.INT8: 5e-3, Kind.W4A8: 1e-2, Kind.NVFP4: 2e-2}
CACHE = {None: 1e-5, "fp8": 1e-3, "nvfp4": 2e-2}


def plan(*kinds, inputs=True, cache=None):
    forms = {f"linear{i}": SimpleNamespace(kind=kind, quantizes_inputs=inputs) for i, kind in enumerate(kinds)}
    return SimpleNamespace(formats=forms, cache=cache)


def test_checkpoints_are_compared_exactly():
    assert (proof._EXACT.weight, proof._EXACT.scale, proof._EXACT.logit, proof._EXACT.loss) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("cache", CACHE)
@pytest.mark.parametrize("kind", LOGITS)
def test_the_coarsest_rounding_decides(kind, cache):
    found = proof._bounds(plan(kind, cache=cache), torch.float32)
    expected = max(LOGITS[kind], CACHE[cache])
    assert (found.weight, found.scale, found.logit) == (1e-6, 1e-6, expected)
    assert found.loss == pytest.approx(0.1 * expected)
    only_weights = proof._bounds(plan(kind, inputs=False, cache=cache), torch.float32)
    assert only_weights.logit == CACHE[cache]


def test_of_several_formats_the_coarsest_counts():
    assert proof._bounds(plan(Kind.FP8, Kind.NVFP4, Kind.INT8), torch.float32).logit == LOGITS[Kind.NVFP4]


@pytest.mark.parametrize(("kinds", "weight"), [((Kind.FP8,), 1e-6), ((Kind.W4A8, Kind.FP8), 5e-2), ((Kind.FP8, Kind.W4A8), 5e-2)])
def test_models_in_16_bits_get_more(kinds, weight):
    found = proof._bounds(plan(*kinds), torch.bfloat16)
    assert (found.weight, found.scale) == (weight, 1e-6)
    assert found.logit == pytest.approx(max(LOGITS[kind] for kind in kinds) + 5e-2)


def _batch():
    (batch,) = random_batches(8, 4, count=1, rows=2)
    return batch


@pytest.mark.parametrize(
    ("errors", "shift", "message"),
    [
        ((2e-6, 0.0), 0.0, "an error of weights of 2e-06, at most 1e-06"),
        ((0.0, 2e-6), 0.0, "an error of scales of 2e-06, at most 1e-06"),
        ((float("nan"), 0.0), 0.0, "an error of weights of nan"),
        ((0.0, 0.0), 1.0, "an error of logits of"),
        ((0.0, 0.0), float("nan"), "an error of logits of nan"),
    ],
)
def test_each_excess_is_named(errors, shift, message):
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[0, 0, 0] += shift
    bounds = proof._bounds(plan(Kind.FP8), torch.float32)
    with pytest.raises(CheckpointError, match=rf"out is not the model in memory: .*{message}"):
        proof._report("out", errors, [other], [logits], [_batch()], bounds)
    same = proof._report("out", (1e-6, 1e-6), [logits], [logits], [_batch()], bounds)
    assert (same.tokens, same.weight_error, same.scale_error, same.logit_error, same.loss_difference) == (8, 1e-6, 1e-6, 0.0, 0.0)
    assert (same.weight_bound, same.scale_bound, same.logit_bound, same.loss_bound) == (1e-6, 1e-6, 3e-3, pytest.approx(3e-4))


def test_random_batches_are_the_same_everywhere_and_use_every_token():
    batches = random_batches(16, 32, count=3, rows=4, seed=2)
    again = random_batches(16, 32, count=3, rows=4, seed=2)
    other = random_batches(16, 32, count=3, rows=4, seed=3)
    assert len(batches) == 3
    assert all(torch.equal(one["tokens"], two["tokens"]) for one, two in zip(batches, again, strict=True))
    assert not torch.equal(batches[0]["tokens"], other[0]["tokens"])
    drawn = torch.stack([batch["tokens"] for batch in batches])
    assert (drawn.shape, int(drawn.min()), int(drawn.max())) == ((3, 4, 32), 0, 15)
    for batch in batches:
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["position_ids"].tolist() == [list(range(32))] * 4
        assert torch.equal(batch["loss_mask"], torch.ones(4, 32))
        assert batch["attention_mask"] is None
