import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.perf.exact import judge_exact, judge_memory
from nemo_opt.perf.verdict import Verdict

COUNTS = st.integers(1, 10**12).map(float)


@given(COUNTS, st.integers(1, 20))
def test_equal_counts_are_ok(count, n):
    assert judge_exact([count] * n, count).verdict is Verdict.OK


@given(COUNTS, st.integers(1, 20), st.sampled_from([-1.0, 1.0]))
def test_count_that_differs_by_one_fails_either_way(count, n, difference):
    finding = judge_exact([count] * n, count + difference)
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == n
    assert finding.reason.startswith(f"{count + difference:,.0f} != {count:,.0f}: "), "all digits: one among a million must show"


def test_count_stays_red_until_accepted():
    finding = judge_exact([5, 5, 7, 7], 7)
    assert finding.verdict is Verdict.REGRESSION
    assert finding.index == 2


def test_count_that_came_back_is_ok():
    assert judge_exact([5, 5, 7], 5).verdict is Verdict.OK


def test_count_of_zero_is_compared():
    assert judge_exact([0, 0], 0).verdict is Verdict.OK
    finding = judge_exact([0, 0], 3)
    assert finding.verdict is Verdict.REGRESSION
    assert finding.change is None


@pytest.mark.parametrize("judge", [judge_exact, judge_memory])
def test_first_run_has_no_baseline(judge):
    assert judge([], 5.0).verdict is Verdict.NO_BASELINE


@pytest.mark.parametrize(("judge", "value"), [(judge_exact, 6), (judge_memory, 8)])
def test_change_in_the_step_of_a_new_environment_is_its_doing(judge, value):
    assert judge([5, 5], value, environment_changed=[2]).verdict is Verdict.ENV_CHANGED
    assert judge([5, 5, value], value, environment_changed=[2]).verdict is Verdict.ENV_CHANGED
    assert judge([5, 5, value], value, environment_changed=[3]).verdict is Verdict.REGRESSION


@pytest.mark.parametrize(
    ("value", "direction", "verdict"),
    [
        (100.9, "lower", Verdict.OK),
        (99.1, "lower", Verdict.OK),
        (101.1, "lower", Verdict.REGRESSION),
        (98.9, "lower", Verdict.IMPROVEMENT),
        (101.1, "higher", Verdict.IMPROVEMENT),
        (98.9, "higher", Verdict.REGRESSION),
    ],
)
def test_memory_may_move_by_a_hundredth(value, direction, verdict):
    assert judge_memory([100.0, 100.0, 100.0], value, direction=direction).verdict is verdict


def test_memory_that_creeps_is_found():
    history = [100.0 * 1.004**i for i in range(9)]
    finding = judge_memory(history, history[-1] * 1.004)
    assert finding.verdict is Verdict.REGRESSION
    assert finding.baseline == pytest.approx(100.8, abs=0.1)


def test_memory_of_zero_is_compared():
    assert judge_memory([0.0], 0.0).verdict is Verdict.OK
    assert judge_memory([0.0], 1.0).verdict is Verdict.REGRESSION


@given(st.floats(1, 1e12), st.floats(0.5, 2.0), st.floats(1e-3, 1e3))
def test_unit_of_memory_does_not_matter(base, factor, unit):
    # Not at the limit itself, where rounding decides.
    if abs(abs(factor - 1) - 0.01) > 1e-9:
        plain, scaled = judge_memory([base], base * factor), judge_memory([base * unit], base * factor * unit)
        assert plain.verdict is scaled.verdict
