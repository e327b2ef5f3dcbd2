from nemo_opt.perf.verdict import Judgement, Step, Verdict


def test_only_two_verdicts_fail():
    assert {verdict for verdict in Verdict if verdict.fails} == {Verdict.REGRESSION, Verdict.MISSING}


def test_verdicts_that_fail_are_the_most_severe():
    ordered = sorted(Verdict, key=lambda verdict: verdict.severity)
    assert [verdict.fails for verdict in ordered] == [True, True] + [False] * 5
    assert ordered[-1] is Verdict.OK


def test_judgement_tells_verdict_series_reason_and_step(figure, run):
    at = Step(before=run(0), after=run(1), environment={"torch": ("2.12", "2.13")})
    told = str(Judgement(series="step/TP1PP2/time", verdict=Verdict.REGRESSION, reason="+12.0%", at=at))
    assert told.startswith("REGRESSION step/TP1PP2/time: +12.0%; at abc0000..abc0001")
    assert told.endswith("torch 2.12 -> 2.13")
    assert str(Judgement(series="a", verdict=Verdict.OK, reason="+0.1%")) == "OK a: +0.1%"


def test_run_without_a_commit_is_told(run):
    assert "nocommit..abc0001" in str(Step(before=run(0, commit=""), after=run(1)))
