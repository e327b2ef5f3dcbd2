"""Who runs when, and what is timed."""

import gc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.perf.interleave import interleave, ratios


class Clock:
    """A clock that contenders move."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def contender(self, name, seconds):
        def run():
            self.now += seconds
            self.order.append(name)

        return run

    def __call__(self):
        return self.now


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2))
@settings(deadline=None)
def test_each_runs_in_each_round_at_each_place_in_turn(count, rounds, warmup):
    clock = Clock()
    names = "abcd"[:count]
    times_s = interleave({name: clock.contender(name, i + 1.0) for i, name in enumerate(names)}, rounds, warmup=warmup, clock=clock)
    assert times_s == {name: pytest.approx([i + 1.0] * rounds) for i, name in enumerate(names)}
    turns = [clock.order[i : i + count] for i in range(0, len(clock.order), count)]
    assert len(turns) == rounds + warmup
    assert [turn[0] for turn in turns] == [names[i % count if count > 2 else 0] for i in range(len(turns))]
    assert count == 1 or all(before != after for before, after in pairwise(clock.order)), "none runs twice in a row"
    assert all(sorted(turn) == list(names) for turn in turns)


def test_waiting_for_the_others_counts():
    clock = Clock()

    def together():
        clock.now += 0.25

    assert interleave({"a": clock.contender("a", 1.0)}, 2, together=together, clock=clock) == {"a": [1.25, 1.25]}


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_between_and_not_during(fails):
    seen = []

    def run():
        seen.append(gc.isenabled())
        if fails:
            raise ZeroDivisionError

    try:
        interleave({"a": run}, 1)
    except ZeroDivisionError:
        assert fails
    assert set(seen) == {False}
    assert gc.isenabled()


def test_ratios_are_turn_by_turn():
    assert ratios([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])
