import math

import numpy as np
import pytest

from nemo_opt.perf.rivals import RULES, Draw

OURS, PREVIOUS, MEDIAN, ROUNDS, CONBENCH = RULES


def draw(factor, *, last=1.0, spike=1.0, fresh=None):
    """A history of 1 % noise, whose last run is `last` and one of whose others is `spike`, and a run of `factor`."""
    history = np.random.default_rng(0).normal(0, 0.01, 30)
    history[10] += math.log(spike)
    history[-1] = math.log(last)
    again = np.log([factor] * 2 if fresh is None else fresh)
    rounds = [np.random.default_rng(i).normal(math.log(x), 0.01, 20) for i, x in enumerate((last, factor))]
    return Draw(history=history, latest=math.log(factor), fresh=again, rounds=(rounds[0], rounds[1]))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_finds_a_large_slowdown_and_nothing_in_an_even_run(rule):
    assert RULES[rule](draw(1.2)) is True
    assert RULES[rule](draw(1.0)) is False


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_fails_a_gain(rule):
    assert not RULES[rule](draw(0.8))


def test_a_fast_run_before_deceives_those_that_look_only_at_it():
    deceived = {rule for rule in RULES if RULES[rule](draw(1.0, last=0.93))}
    assert deceived == {PREVIOUS, ROUNDS}


def test_one_disturbed_run_deceives_all_that_do_not_run_again():
    deceived = {rule for rule in RULES if RULES[rule](draw(1.2, fresh=[1.0, 1.0]))}
    assert deceived == {PREVIOUS, MEDIAN, ROUNDS, CONBENCH}


def test_an_outlier_in_the_history_blinds_only_mean_and_deviation():
    blind = {rule for rule in RULES if not RULES[rule](draw(1.15, spike=1.5))}
    assert blind == {CONBENCH}
