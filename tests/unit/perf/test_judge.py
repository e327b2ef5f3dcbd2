import numpy as np
import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf.accepted import Accepted
from nemo_opt.perf.judge import compare, judge
from nemo_opt.perf.verdict import Verdict

TIME = "step/TP1PP2/time"


def noisy(n, seed=0, deviation=0.01):
    return (100 * np.exp(np.random.default_rng(seed).normal(0, deviation, n))).tolist()


def accepted(since, series=TIME):
    return Accepted(series=series, since=since, reason="meant", author="A. Person")


@pytest.fixture
def history(figure, run):
    """Thirty even runs of a time, a count and a memory."""
    return [run(i, figure(x), figure(7, "count", kind="exact"), figure(1e6, "peak", kind="memory")) for i, x in enumerate(noisy(30))]


@pytest.fixture
def latest(figure, run):
    """`latest(time, count, peak, number=30)`."""

    def make(time=100.0, count=7, peak=1e6, number=30, **more):
        return run(number, figure(time), figure(count, "count", kind="exact"), figure(peak, "peak", kind="memory"), **more)

    return make


def verdicts(judgements):
    return {judgement.series.rsplit("/", 1)[1]: judgement.verdict for judgement in judgements}


def fresh(latest, *times, **more):
    return [latest(time, number=30 + i, **{"commit": latest().commit} | more) for i, time in enumerate(times, start=1)]


def test_even_run_is_ok(history, latest):
    assert set(verdicts(judge(history, latest())).values()) == {Verdict.OK}


def test_each_kind_has_its_rule_and_the_worst_comes_first(history, latest):
    judgements = judge(history, latest(115.0, 8, 0.9e6), fresh=fresh(latest, 114.0, 116.0))
    assert verdicts(judgements) == {"time": Verdict.REGRESSION, "count": Verdict.REGRESSION, "peak": Verdict.IMPROVEMENT}
    assert [judgement.verdict.severity for judgement in judgements] == sorted(judgement.verdict.severity for judgement in judgements)
    assert abs(judgements[0].change) >= abs(judgements[1].change)


def test_jump_asks_for_fresh_runs_and_gets_them(history, latest):
    (first,) = [judgement for judgement in judge(history, latest(115.0)) if judgement.unconfirmed]
    assert first.series == TIME
    assert verdicts(judge(history, latest(115.0), fresh=fresh(latest, 114.0, 116.0)))["time"] is Verdict.REGRESSION
    assert verdicts(judge(history, latest(115.0), fresh=fresh(latest, 99.0, 101.0)))["time"] is Verdict.OK


def test_runs_that_are_judged_are_not_their_own_history(history, latest):
    again = fresh(latest, 114.0, 116.0)
    alone, among = (judge(past, latest(115.0), fresh=again) for past in (history, [*again, latest(115.0), *history]))
    assert alone == among


def test_order_of_the_history_given_does_not_matter(history, latest):
    assert judge(history[::-1], latest(115.0)) == judge(history, latest(115.0))


def test_run_is_not_judged_by_later_ones(history, latest):
    later = [latest(150.0, 9, number=number) for number in range(40, 60)]
    assert judge([*history, *later], latest()) == judge(history, latest())


def test_change_is_attributed_to_its_step(figure, run, latest):
    runs = [run(i, figure(x * (1.1 if i >= 20 else 1)), environment={"torch": "2.12"}) for i, x in enumerate(noisy(25))]
    (judgement, *_) = judge(runs, latest(110.0, environment={"torch": "2.12"}))
    assert judgement.verdict is Verdict.REGRESSION
    assert (judgement.at.before, judgement.at.after) == (runs[19], runs[20])
    assert judgement.at.environment == {}


def test_environment_of_the_same_step_is_told_and_does_not_fail(figure, run, latest):
    runs = [
        run(i, figure(x * (1.1 if i >= 20 else 1)), environment={"torch": "2.13" if i >= 20 else "2.12"}) for i, x in enumerate(noisy(25))
    ]
    judgement = {judgement.series: judgement for judgement in judge(runs, latest(110.0, environment={"torch": "2.13"}))}[TIME]
    assert judgement.verdict is Verdict.ENV_CHANGED
    assert judgement.at.environment == {"torch": ("2.12", "2.13")}
    assert "torch 2.12 -> 2.13" in str(judgement)


def test_accepted_level_begins_a_new_segment(figure, run, latest):
    runs = [run(i, figure(x * (1.1 if i >= 15 else 1))) for i, x in enumerate(noisy(30))]
    assert verdicts(judge(runs, latest(110.0)))["time"] is Verdict.REGRESSION
    for since in (runs[15].started, runs[15].commit, runs[15].commit[:7]):
        assert verdicts(judge(runs, latest(110.0), [accepted(since)]))["time"] is Verdict.OK
    assert verdicts(judge(runs, latest(110.0), [accepted(runs[15].started, "another")]))["time"] is Verdict.REGRESSION
    # What is worse than the accepted level is seen again.
    assert verdicts(judge(runs, latest(125.0), [accepted(runs[15].started)], fresh=fresh(latest, 124.0, 126.0)))["time"].fails


def test_count_accepted_by_the_change_itself_has_no_baseline_yet(history, latest):
    new = latest(count=8)
    assert verdicts(judge(history, new))["count"] is Verdict.REGRESSION
    assert verdicts(judge(history, new, [accepted(new.started, "*/count")]))["count"] is Verdict.NO_BASELINE


def test_series_that_is_gone_is_missing(history, figure, run):
    judgements = judge(history, run(30, figure(100.0), failed=("peak of the step",)))
    assert [(judgement.verdict, judgement.series) for judgement in judgements[:2]] == [
        (Verdict.MISSING, "step/TP1PP2/count"),
        (Verdict.MISSING, "step/TP1PP2/peak"),
    ]
    assert "peak of the step" in judgements[0].reason


def test_series_does_not_cease_to_be_missing_with_the_first_run_that_lacks_it(history, figure, run):
    runs = [*history, run(30, figure(100.0))]
    assert verdicts(judge(runs, run(31, figure(100.0))))["count"] is Verdict.MISSING


def test_series_taken_away_on_purpose_is_accepted(history, figure, run):
    gone = run(30, figure(100.0))
    judgements = judge(history, gone, [accepted(gone.started, "*/count"), accepted(gone.started, "*/peak")])
    assert verdicts(judgements) == {"time": Verdict.OK}


def test_short_run_does_not_miss_what_only_the_full_set_has(figure, run):
    runs = [run(i, figure(100.0), *([] if i % 2 else [figure(50.0, "wide")]), short=bool(i % 2)) for i in range(12)]
    assert verdicts(judge(runs, run(12, figure(100.0), short=True))) == {"time": Verdict.OK}
    assert verdicts(judge(runs, run(12, figure(100.0), short=False)))["wide"] is Verdict.MISSING


def test_full_set_is_expected_however_many_short_runs_came_since(figure, run):
    runs = [run(0, figure(100.0), figure(50.0, "wide"), short=False), *(run(i, figure(100.0)) for i in range(1, 20))]
    assert verdicts(judge(runs, run(20, figure(100.0), short=False)))["wide"] is Verdict.MISSING


def test_new_series_has_no_baseline(history, figure, run, latest):
    new = run(30, *latest().figures, figure(3.0, "new"))
    assert verdicts(judge(history, new))["new"] is Verdict.NO_BASELINE
    assert set(verdicts(judge([], latest())).values()) == {Verdict.NO_BASELINE}


def test_one_of_many_series_may_move_by_chance(figure, run):
    """Of noise with which the jump has p = 0.0007: a regression alone, and none among 120 even series."""
    metrics = [f"m{i}" for i in range(120)]
    values = {metric: noisy(33, seed, 0.02) for seed, metric in enumerate(metrics, start=4)}

    def judged(names, factor):
        values["m0"][30:] = [float(np.median(values["m0"][:30])) * factor] * 3
        records = [run(i, *(figure(values[name][i], name) for name in names), commit="a" * 40) for i in range(33)]
        return verdicts(judge(records[:30], records[30], fresh=records[31:]))["m0"]

    assert judged(["m0"], 1.06) is Verdict.REGRESSION
    assert judged(metrics, 1.06) is Verdict.INCONCLUSIVE
    assert judged(metrics, 1.12) is Verdict.REGRESSION


def test_history_of_another_platform_is_refused(history, latest):
    with pytest.raises(DataError, match="there cannot be judged by runs of here"):
        judge(history, latest(platform="there"))


def test_fresh_runs_are_two_of_the_same_commit(history, latest):
    for times in ([100.0], [100.0] * 3):
        with pytest.raises(DataError, match=f"{len(times)} fresh runs"):
            judge(history, latest(), fresh=fresh(latest, *times))
    with pytest.raises(DataError, match="same commit"):
        judge(history, latest(), fresh=fresh(latest, 100.0, 100.0, commit="f" * 40))


@pytest.mark.parametrize("change", [{"unit": "s"}, {"kind": "time"}, {"direction": "higher"}])
def test_series_of_another_form_is_refused_unless_accepted(history, figure, run, latest, change):
    new = run(30, figure(100.0, **change), *latest().figures[1:])
    with pytest.raises(DataError, match=TIME):
        judge(history, new)
    assert verdicts(judge(history, new, [accepted(new.started)]))["time"] is Verdict.NO_BASELINE


def test_ratio_of_zero_is_refused_by_name(history, latest):
    with pytest.raises(DataError, match=f"{TIME}: .*positive"):
        judge(history, latest(0.0))


# Pairs


@pytest.fixture
def sides(latest):
    """`sides(factor, count)`: eight runs of the base, and of a change."""

    def make(factor=1.0, count=7, peak=1e6, n=8):
        base = [latest(x, number=2 * i) for i, x in enumerate(noisy(n))]
        return base, [latest(x * factor, count, peak, number=2 * i + 1) for i, x in enumerate(noisy(n, seed=1))]

    return make


def test_equal_trees_are_ok(sides):
    assert set(verdicts(compare(*sides())).values()) == {Verdict.OK}


def test_slower_tree_is_told_by_name(sides):
    judgements = compare(*sides(1.06, 8, 1.2e6))
    assert all(judgement.verdict is Verdict.REGRESSION for judgement in judgements)
    assert judgements[0].series == "step/TP1PP2/peak"
    assert all(judgement.at is None for judgement in judgements)


def test_one_of_many_series_needs_more_pairs(figure, run):
    def compared(n):
        pairs = {f"m{i}": (noisy(n, 2 * i), noisy(n, 2 * i + 1)) for i in range(30)}
        pairs["m0"] = (pairs["m0"][0], [1.06 * x for x in pairs["m0"][1]])
        sides = [[run(2 * i + side, *(figure(both[side][i], name) for name, both in pairs.items())) for i in range(n)] for side in (0, 1)]
        return {judgement.series.rsplit("/", 1)[1]: judgement for judgement in compare(*sides)}

    assert compared(8)["m0"].verdict is Verdict.INCONCLUSIVE
    assert compared(8)["m0"].unconfirmed
    judgements = compared(16)
    assert [name for name, judgement in judgements.items() if judgement.verdict is not Verdict.OK] == ["m0"]
    assert judgements["m0"].verdict is Verdict.REGRESSION


def test_accepted_series_does_not_fail(sides):
    judgements = compare(*sides(1.06, 8), accepted=[accepted("abc0000")])
    assert verdicts(judgements) == {"time": Verdict.OK, "count": Verdict.REGRESSION, "peak": Verdict.OK}
    assert any("accepted by A. Person: meant" in judgement.reason for judgement in judgements)


def test_series_that_the_change_lost_is_missing(sides, run):
    base, head = sides()
    lost = [run(2 * i + 1, *record.figures[1:]) for i, record in enumerate(head)]
    assert verdicts(compare(base, lost))["time"] is Verdict.MISSING
    assert verdicts(compare(base, [*lost[:1], *head[1:]]))["time"] is Verdict.MISSING
    assert verdicts(compare(lost, base))["time"] is Verdict.NO_BASELINE


def test_unequal_sides_are_refused(sides):
    base, head = sides()
    for one, other in ((base, head[1:]), ([], [])):
        with pytest.raises(DataError, match="pairs are needed"):
            compare(one, other)
