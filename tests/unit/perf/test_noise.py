"""How far runs lie apart, as it is stated beside a figure."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.errors import DataError
from nemo_opt.perf.noise import MIN_RUNS, is_within, stated
from nemo_opt.perf.record import Figure

values = st.lists(st.floats(1e-3, 1e3), min_size=MIN_RUNS, max_size=40)


def figure(value=1.0, kind="ratio", samples=(), **more):
    return Figure(bench="loss", case="TP1", metric="time of ModelOpt's", value=value, kind=kind, samples=samples, **more)


def drawn(n, deviation=0.04, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0.0, deviation, n)).tolist()


def test_too_few_runs_tell_no_noise():
    past = drawn(MIN_RUNS)
    assert stated(figure(), past[:-1]) is None
    assert stated(figure(), past) > 0
    with pytest.raises(DataError, match="no noise is known"):
        is_within(figure(), past[:-1])


def test_the_first_runs_state_that_of_their_rounds_and_of_their_processes():
    quiet, loud = figure(samples=(1.0, 1.0, 1.0)), figure(samples=(1.0, 1.3, 0.8, 1.1, 0.9))
    assert stated(quiet, []) == pytest.approx(math.expm1(3 * 0.04))
    assert stated(figure(kind="time", samples=(2.0, 2.0, 2.0)), []) > 2 * stated(quiet, [])
    assert stated(loud, []) > 2 * stated(quiet, [])
    assert stated(figure(samples=(1.0, 1.0)), []) is None
    assert stated(quiet, drawn(MIN_RUNS)) == stated(figure(), drawn(MIN_RUNS)), "enough runs say more than rounds"
    assert stated(figure(samples=quiet.samples, luck=0.2), []) == pytest.approx(math.expm1(3 * 0.2)), "a benchmark knows of more"
    assert is_within(quiet, [1.14] * 5)
    assert not is_within(quiet, [1.16] * 5)
    assert stated(quiet, [1.0]) > stated(quiet, [1.0] * 5) > stated(quiet, []), "the level of a single run is as uncertain as the run"


def test_two_of_three_rounds_that_agree_are_no_certainty():
    agreeing = figure(samples=(1.0, 1.0, 1.2))
    assert stated(agreeing, []) > 1.5 * stated(figure(samples=(1.0, 1.0, 1.0)), [])
    assert is_within(agreeing, [1.2, 1.2, 1.2])


@pytest.mark.parametrize("rounds", [3, 4, 10])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_normal_rounds_state_what_their_runs_keep(rounds, n):
    """Three rounds tell little of their own noise, so one run of a hundred may lie outside: 0.1 to 1.3 % of 2000 did."""

    def run(generator):
        return np.exp(generator.normal(0.0, 0.04) + generator.normal(0.0, 0.08, rounds)).tolist()

    def is_outside(seed):
        generator = np.random.default_rng(seed)
        *past, samples = (run(generator) for _ in range(n + 1))
        return not is_within(figure(float(np.median(samples)), samples=tuple(samples)), [float(np.median(one)) for one in past])

    assert sum(is_outside(seed) for seed in range(1000)) < 20


def test_counts_have_none_and_memory_its_tolerance():
    assert stated(figure(kind="exact"), []) == 0.0
    assert stated(figure(kind="memory"), []) == 0.01
    assert is_within(figure(3, "exact"), [3, 3])
    assert not is_within(figure(4, "exact"), [3, 3])
    assert is_within(figure(1.009, "memory"), [1.0])
    assert not is_within(figure(1.02, "memory"), [1.0])


@pytest.mark.parametrize("n", [MIN_RUNS, 12, 30])
def test_normal_noise_stays_within_what_is_stated(n):
    """One run of 370, whatever the number of runs: of 2000 at most 1 %, and that many times three deviations would not."""
    outside = sum(not is_within(figure(past[-1]), past[:-1]) for past in (drawn(n + 1, seed=seed) for seed in range(2000)))
    assert outside < 20
    far = sum(is_within(figure(math.exp(0.04 * 12)), drawn(30, seed=seed)) for seed in range(200))
    assert far == 0, "twelve deviations are no noise"


def test_a_change_of_level_is_no_noise():
    past = [*drawn(15), *(1.5 * value for value in drawn(15, seed=1))]
    assert stated(figure(), past) < 0.3
    assert is_within(figure(1.5), past)
    assert not is_within(figure(1.0), past)


def test_one_disturbed_run_is_no_noise():
    quiet = drawn(20)
    assert stated(figure(), [*quiet[:-1], 3.0]) < 1.5 * stated(figure(), quiet)


@settings(max_examples=50)
@given(values, st.floats(1e-3, 1e3))
def test_it_does_not_depend_on_the_scale(past, scale):
    assert stated(figure(), [scale * value for value in past]) == pytest.approx(stated(figure(), past), rel=1e-6)


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3), st.integers(MIN_RUNS, 40))
def test_a_constant_series_repeats(value, n):
    assert is_within(figure(value), [value] * n)
    assert not is_within(figure(2 * value), [value] * n)
