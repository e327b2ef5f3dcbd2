import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.errors import DataError
from nemo_opt.perf.detector import LOOK_BACK, control_discoveries, judge_latest
from nemo_opt.perf.noise import MIN_RUNS
from nemo_opt.perf.verdict import Verdict


def noisy(n, seed=0, deviation=0.01):
    return (100 * np.exp(np.random.default_rng(seed).normal(0, deviation, n))).tolist()


# Jumps


@pytest.mark.parametrize(
    ("factor", "direction", "verdict"),
    [
        (1.1, "lower", Verdict.REGRESSION),
        (1 / 1.1, "lower", Verdict.IMPROVEMENT),
        (1.1, "higher", Verdict.IMPROVEMENT),
        (1 / 1.1, "higher", Verdict.REGRESSION),
    ],
)
def test_confirmed_jump_is_judged_by_direction(factor, direction, verdict):
    finding = judge_latest(noisy(30), [factor * x for x in noisy(3, seed=1)], direction=direction)
    assert finding.verdict is verdict
    assert finding.change == pytest.approx(factor - 1, abs=0.02)
    assert finding.index == 30
    assert finding.p < 0.001
    assert "confirmed by two fresh runs" in finding.reason


def test_jump_seen_once_waits_for_fresh_runs():
    finding = judge_latest(noisy(30), [115.0])
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.unconfirmed
    assert not finding.verdict.fails


def test_outlier_is_not_confirmed():
    finding = judge_latest(noisy(30), [115.0, 100.5, 99.0])
    assert finding.verdict is Verdict.OK
    assert "first +15" in finding.reason
    assert "not confirmed" in finding.reason
    assert finding.value == pytest.approx(100.5)


def test_fresh_runs_cannot_turn_an_even_first_run_red():
    assert judge_latest(noisy(30), [100.0, 115.0, 116.0]).verdict is Verdict.OK


def test_jump_that_swings_back_is_not_confirmed():
    assert not judge_latest(noisy(30), [115.0, 85.0, 86.0]).verdict.fails


def test_jump_of_the_two_runs_before_is_its_confirmation():
    finding = judge_latest([*noisy(30), 115.0, 114.0], [116.0])
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == 30


def test_one_outlier_before_is_no_confirmation():
    assert judge_latest([*noisy(30), 100.0, 114.0], [116.0]).unconfirmed


def test_jump_below_the_threshold_is_ok_however_sure():
    assert judge_latest([100.0] * 30, [104.0] * 3).verdict is Verdict.OK
    assert judge_latest([100.0] * 30, [105.1] * 3).verdict is Verdict.REGRESSION


def test_outliers_in_the_history_hide_no_jump():
    history = noisy(30)
    for i in (3, 11, 12, 25):
        history[i] *= 3
    assert judge_latest(history, [112.0, 111.0, 113.0]).verdict is Verdict.REGRESSION


def test_noisy_series_is_inconclusive_where_a_quiet_one_is_judged():
    values = [109.0, 108.5, 109.5]
    assert judge_latest(noisy(30, deviation=0.07), values).verdict is Verdict.INCONCLUSIVE
    assert judge_latest(noisy(30, deviation=0.07), [100.5]).verdict is Verdict.OK
    assert judge_latest(noisy(30, deviation=0.01), values).verdict is Verdict.REGRESSION


def test_noisy_series_still_shows_what_is_large():
    assert judge_latest(noisy(30, deviation=0.07), [160.0, 150.0, 155.0]).verdict is Verdict.REGRESSION


# Drift


def test_small_step_is_found_after_some_runs():
    finding = judge_latest([*noisy(40), *(1.04 * x for x in noisy(5, seed=1))], [104.0])
    assert finding.verdict is Verdict.REGRESSION
    assert abs(finding.index - 40) <= 1
    assert finding.change == pytest.approx(0.04, abs=0.01)


def test_level_stays_red_until_accepted():
    after = [1.1 * x for x in noisy(3 * LOOK_BACK, seed=1)]
    finding = judge_latest([*noisy(40), *after], [110.0])
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == 40
    assert "accepted" in finding.reason
    assert judge_latest(after, [110.0]).verdict is Verdict.OK


def test_steps_that_are_each_too_small_add_up():
    history = [x * 1.003**i for i, x in enumerate(noisy(60, deviation=0.005))]
    assert judge_latest(history, [history[-1]]).verdict is Verdict.REGRESSION


def test_creep_is_not_seen_in_noise_as_large():
    assert judge_latest(noisy(60, deviation=0.07), [100.0]).verdict is Verdict.OK


def test_level_that_came_back_is_ok():
    finding = judge_latest([*noisy(20), *(1.1 * x for x in noisy(10, seed=1)), *noisy(20, seed=2)], [100.0])
    assert finding.verdict is Verdict.OK


def test_regression_after_an_improvement_is_found():
    history = [*noisy(20), *(0.8 * x for x in noisy(20, seed=1)), *(0.9 * x for x in noisy(4, seed=2))]
    finding = judge_latest(history, [90.0])
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == 40


# Environment


def test_jump_with_the_environment_is_not_the_commits():
    history, values = noisy(30), [115.0, 114.0, 116.0]
    assert judge_latest(history, values, environment_changed=[30]).verdict is Verdict.ENV_CHANGED
    assert judge_latest(history, values, environment_changed=[29]).verdict is Verdict.REGRESSION
    history += values[:2]
    assert judge_latest(history, values[2:], environment_changed=[30]).verdict is Verdict.ENV_CHANGED
    assert judge_latest(history, values[2:], environment_changed=[32]).verdict is Verdict.REGRESSION


def test_environment_without_a_move_is_ok():
    assert judge_latest(noisy(30), [100.5], environment_changed=[30]).verdict is Verdict.OK


@pytest.mark.parametrize("after", [5, 25])
def test_level_with_the_environment_is_not_the_commits(after):
    history = [*noisy(30), *(1.1 * x for x in noisy(after, seed=1))]
    assert judge_latest(history, [110.0], environment_changed=[30]).verdict is Verdict.ENV_CHANGED
    assert judge_latest(history, [110.0], environment_changed=[28]).verdict is Verdict.REGRESSION


def test_commit_is_not_excused_by_an_earlier_environment():
    history = [*noisy(30), *(1.1 * x for x in noisy(15, seed=1)), *(1.25 * x for x in noisy(15, seed=2))]
    finding = judge_latest(history, [125.0], environment_changed=[30])
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == 45


# What there may be


@pytest.mark.parametrize("n", range(MIN_RUNS))
def test_too_short_a_history_is_no_baseline(n):
    finding = judge_latest([100.0] * n, [500.0])
    assert finding.verdict is Verdict.NO_BASELINE
    assert f"{n} earlier runs" in finding.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_value_without_a_logarithm_is_refused(value):
    with pytest.raises(DataError, match="positive"):
        judge_latest([100.0] * 10, [value])
    with pytest.raises(DataError, match="positive"):
        judge_latest([*[100.0] * 10, value], [100.0])


@pytest.mark.parametrize("n", [0, 2, 4, 5])
def test_only_the_declared_number_of_fresh_runs_is_taken(n):
    with pytest.raises(DataError, match=f"{n} values"):
        judge_latest([100.0] * 10, [100.0] * n)


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-9, 1e9), st.integers(MIN_RUNS, 80), st.sampled_from([1, 3]))
def test_constant_is_never_flagged(value, n, runs):
    assert judge_latest([value] * n, [value] * runs).verdict is Verdict.OK


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-9, 1e9), st.integers(MIN_RUNS, 60), st.sampled_from([1.06, 1.5, 10.0]))
def test_mutated_constant_is_always_flagged(value, n, factor):
    assert judge_latest([value] * n, [value * factor] * 3).verdict is Verdict.REGRESSION
    assert judge_latest([value] * n, [value / factor] * 3).verdict is Verdict.IMPROVEMENT


SEEDS = st.integers(0, 10**6)
FACTORS = st.sampled_from([0.8, 0.93, 1.0, 1.07, 1.2])


@settings(deadline=None, max_examples=40)
@given(SEEDS, FACTORS, st.floats(1e-6, 1e6))
def test_unit_does_not_matter(seed, factor, unit):
    history, values = noisy(25, seed, 0.02), [factor * x for x in noisy(3, seed + 1, 0.02)]
    plain, scaled = judge_latest(history, values), judge_latest([unit * x for x in history], [unit * x for x in values])
    assert plain.verdict is scaled.verdict
    assert scaled.change == pytest.approx(plain.change, abs=1e-9)


MIRROR = {Verdict.REGRESSION: Verdict.IMPROVEMENT, Verdict.IMPROVEMENT: Verdict.REGRESSION}


@settings(deadline=None, max_examples=40)
@given(SEEDS, FACTORS)
def test_time_and_speed_get_the_same_verdict(seed, factor):
    history, values = noisy(25, seed, 0.02), [factor * x for x in noisy(3, seed + 1, 0.02)]
    plain = judge_latest(history, values)
    speeds = judge_latest([1 / x for x in history], [1 / x for x in values], direction="higher")
    other = judge_latest(history, values, direction="higher")
    assert plain.verdict is speeds.verdict
    assert other.verdict is MIRROR.get(plain.verdict, plain.verdict)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.permutations(range(20)), st.sampled_from([1.0, 1.2]))
def test_order_of_a_level_does_not_matter_to_a_jump(seed, order, factor):
    """Without a change point in the history, which noise this small does not make."""
    history = noisy(20, seed, 0.001)
    plain, other = judge_latest(history, [100.0 * factor] * 3), judge_latest([history[i] for i in order], [100.0 * factor] * 3)
    assert plain.verdict is other.verdict
    assert other.z == pytest.approx(plain.z)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from([0.8, 1.0, 1.3]))
def test_history_seen_twice_does_not_change_the_verdict(seed, factor):
    history, values = noisy(20, seed, 0.01), [factor * x for x in noisy(3, seed + 1, 0.01)]
    assert judge_latest(history * 2, values).verdict is judge_latest(history, values).verdict


# Many series


def test_discoveries_are_those_of_the_paper():
    """The example of Benjamini and Hochberg 1995, section 4.1: four of fifteen."""
    ps = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    assert control_discoveries(ps) == [True] * 4 + [False] * 11
    assert control_discoveries(ps[::-1]) == [False] * 11 + [True] * 4


def test_few_of_many_even_series_are_discoveries():
    rng = np.random.default_rng(0)
    assert sum(any(control_discoveries(rng.random(100).tolist())) for _ in range(400)) / 400 <= 0.08


def test_nothing_to_discover():
    assert control_discoveries([]) == []
    assert control_discoveries([0.04, 1.0]) == [False, False]
    assert control_discoveries([0.04]) == [True]
