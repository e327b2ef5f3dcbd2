import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from nemo_opt.errors import DataError
from nemo_opt.perf.pairs import MIN_PAIRS, MORE_PAIRS, judge_pairs, middle, signed_rank_p
from nemo_opt.perf.verdict import Verdict


def pairs(n, size=0.0, seed=0, deviation=0.01):
    rng = np.random.default_rng(seed)
    mood = rng.normal(0, 0.05, n)
    base, head = (100 * np.exp(mood + rng.normal(0, deviation, n)) for _ in range(2))
    return base.tolist(), (head * (1 + size)).tolist()


@pytest.mark.parametrize("n", [8, 12, 16])
def test_five_per_cent_are_found(n):
    finding = judge_pairs(*pairs(n, 0.05))
    assert finding.verdict is Verdict.REGRESSION
    assert finding.change == pytest.approx(0.05, abs=0.02)
    assert finding.n == n


@pytest.mark.parametrize(("size", "direction"), [(-0.06, "lower"), (0.06, "higher")])
def test_gain_is_an_improvement(size, direction):
    assert judge_pairs(*pairs(8, size), direction=direction).verdict is Verdict.IMPROVEMENT


def test_nothing_is_ok():
    assert judge_pairs(*pairs(8)).verdict is Verdict.OK


def test_small_change_is_ok_however_sure():
    base, head = pairs(30, 0.015, deviation=0.001)
    finding = judge_pairs(base, head)
    assert finding.verdict is Verdict.OK
    assert finding.p < 1e-6


def test_noise_that_hides_five_per_cent_is_inconclusive_and_asks_for_more():
    finding = judge_pairs(*pairs(8, 0.0, seed=1, deviation=0.10))
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.unconfirmed
    assert not judge_pairs(*pairs(MORE_PAIRS, 0.0, seed=1, deviation=0.10)).unconfirmed


@pytest.mark.parametrize("n", range(1, MIN_PAIRS))
def test_too_few_pairs_cannot_fail(n):
    assert judge_pairs([1.0] * n, [3.0] * n).verdict is Verdict.INCONCLUSIVE


def test_one_disturbed_pair_decides_nothing():
    base, head = pairs(8)
    head[3] *= 5
    assert not judge_pairs(base, head).verdict.fails
    base, head = pairs(16, 0.06)
    base[3] *= 5
    assert judge_pairs(base, head).verdict is Verdict.REGRESSION


def test_constants_are_judged():
    assert judge_pairs([2.0] * 8, [2.0] * 8).verdict is Verdict.OK
    assert judge_pairs([2.0] * 8, [2.2] * 8).verdict is Verdict.REGRESSION


def test_no_pairs_are_no_baseline():
    assert judge_pairs([], []).verdict is Verdict.NO_BASELINE


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_value_that_has_no_ratio_is_refused(value):
    with pytest.raises(DataError, match="positive"):
        judge_pairs([1.0] * 8, [1.0] * 7 + [value])
    with pytest.raises(DataError, match="positive"):
        judge_pairs([1.0] * 7 + [value], [1.0] * 8)


def test_unequal_numbers_are_refused():
    with pytest.raises(DataError, match="8 runs of the base != 7"):
        judge_pairs([1.0] * 8, [1.0] * 7)


SEEDS = st.integers(0, 10**6)
SIZES = st.sampled_from([-0.1, -0.04, 0.0, 0.04, 0.1])


@settings(deadline=None, max_examples=50)
@given(SEEDS, SIZES, st.floats(1e-6, 1e6), st.permutations(range(8)))
def test_unit_and_order_of_pairs_do_not_matter(seed, size, unit, order):
    base, head = pairs(8, size, seed, 0.02)
    plain = judge_pairs(base, head)
    other = judge_pairs([base[i] * unit for i in order], [head[i] * unit for i in order])
    assert other.verdict is plain.verdict
    assert other.change == pytest.approx(plain.change)


MIRROR = {Verdict.REGRESSION: Verdict.IMPROVEMENT, Verdict.IMPROVEMENT: Verdict.REGRESSION}


@settings(deadline=None, max_examples=50)
@given(SEEDS, SIZES)
def test_directions_mirror_each_other(seed, size):
    base, head = pairs(8, size, seed, 0.02)
    plain = judge_pairs(base, head).verdict
    mirrored = MIRROR.get(plain, plain)
    assert judge_pairs(base, head, direction="higher").verdict is mirrored
    assert judge_pairs(head, base).verdict is mirrored


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=9))
def test_p_is_the_share_of_signs_that_are_as_extreme(differences):
    from scipy.stats import rankdata

    ranks = rankdata(np.abs(differences))
    below = sum(rank for rank, difference in zip(ranks, differences, strict=True) if difference < 0)
    signs = itertools.product([0, 1], repeat=len(ranks))
    share = np.mean([np.dot(chosen, ranks) <= below + 1e-9 for chosen in signs])
    assert signed_rank_p(np.array(differences, float)) == pytest.approx(share)


@pytest.mark.parametrize("n", [3, 8, 20, 40])
def test_p_is_that_of_scipy(n):
    differences = np.random.default_rng(n).normal(0.3, 1.0, n)
    assert signed_rank_p(differences) == pytest.approx(wilcoxon(differences, alternative="greater", method="exact").pvalue)


def test_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(300):
        low, high = map(float, _interval(judge_pairs(*pairs(8, 0.02, seed, 0.02)).reason))
        held += low <= 2.0 <= high
    assert 0.92 <= held / 300 <= 0.99


def _interval(reason):
    import re

    return re.search(r"95 % of ([-+.\d]+)% to ([-+.\d]+)%", reason).groups()


def test_large_median_without_significance_does_not_fail():
    assert judge_pairs([100.0] * 8, [106.0] * 7 + [90.0]).verdict is Verdict.INCONCLUSIVE
    assert judge_pairs([100.0] * 16, [106.0] * 10 + [90.0] * 6).verdict is Verdict.INCONCLUSIVE


def test_eight_pairs_find_five_per_cent_where_pairs_deviate_by_two():
    """What the precision of a pair is set for (`duel.PRECISION`); 98.6 % of 2000."""
    draws = np.random.default_rng(0).normal(np.log(1.05), 0.02, (300, MIN_PAIRS))
    found = [judge_pairs([1.0] * MIN_PAIRS, np.exp(logs).tolist()).verdict.fails for logs in draws]
    assert np.mean(found) >= 0.95


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-1, 1))
def test_the_middle_moves_with_its_values(values, step):
    found = middle(np.array(values))
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12
    assert middle(np.array(values) + step) == pytest.approx(found + step, abs=1e-9)
    assert middle(-np.array(values)) == pytest.approx(-found, abs=1e-12)


def test_the_middle_needs_two_thirds_of_the_values_of_a_median_and_does_not_follow_outliers():
    draws = np.random.default_rng(0).normal(size=(4000, 16))
    of_middle, of_median = (np.std([estimate(draw) for draw in draws]) for estimate in (middle, np.median))
    assert 0.60 < (of_middle / of_median) ** 2 < 0.75
    draws[:, :3] = 100.0
    assert np.abs([middle(draw) for draw in draws]).max() < 3.0
