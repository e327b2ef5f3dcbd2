"""Runs, records, fresh runs where something jumped, and what the commands say and exit with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_opt.cli.main import app
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.perf import compare, judge, record, tracker
from nemo_opt.perf.pair_file import read_pairs

HERE = "a-platform"
ROOT = Path(__file__).parents[3]
BENCHMARK = """
import pytest


def test_speed(benchmark, figure):
    benchmark(lambda: None)
    figure(bench="export", case="fp8", metric="time of a copy's", samples=[1.0, {value}, 3.0], peer="a copy", peer_value=1.0, goal=1.5)


def test_broken(figure):
    figure(bench="broken", case="fp8", metric="time", value=1.0)
    assert not {fails}


@pytest.mark.wide
def test_wide(figure):
    figure(bench="wide", case="fp8", metric="time", value=1.0)
"""


@pytest.fixture(autouse=True)
def platform(monkeypatch):
    monkeypatch.setattr(tracker, "platform_key", lambda: HERE)


@pytest.fixture
def benchmarks(tmp_path):
    """A folder of benchmarks like ours."""

    def make(value=2.0, *, fails=False):
        folder = tmp_path / "benchmarks"
        folder.mkdir(exist_ok=True)
        (folder / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
        (folder / "test_it.py").write_text(BENCHMARK.format(value=value, fails=fails))
        return folder

    return make


@pytest.fixture
def history(tmp_path, run, figure):
    """Records as of twelve days, near 2."""
    folder = tmp_path / "benchmarks" / "history"
    for day in range(1, 13):
        record.write(replace(run(day, figure(2.0 + 0.01 * (day % 3))), platform=HERE), folder)
    return folder


class TestMeasure:
    def test_figures_become_a_record_but_those_of_a_benchmark_that_failed(self, benchmarks):
        run = tracker.measure(benchmarks(fails=True))
        assert {figure.series: figure.value for figure in run.figures} == {"export/fp8/time of a copy's": 2.0}
        assert run.by_series()["export/fp8/time of a copy's"].samples == (1.0, 2.0, 3.0)
        assert [name.rpartition("::")[2] for name in run.failed] == ["test_broken"]
        assert run.short

    @pytest.mark.wide
    def test_the_full_set(self, benchmarks):
        run = tracker.measure(benchmarks(), short=False)
        assert {figure.bench for figure in run.figures} == {"export", "broken", "wide"}
        assert run.failed == ()
        assert not run.short

    def test_nothing_to_measure(self, benchmarks, tmp_path):
        with pytest.raises(ConfigError, match="measured nothing"):
            tracker.measure(benchmarks(), only="no_such_thing")
        with pytest.raises(ConfigError, match="no such folder"):
            tracker.measure(tmp_path / "nowhere")


class TestRun:
    @pytest.fixture
    def measured(self, monkeypatch, run, figure):
        """Runs that measure these values, one after the other; how many have run."""
        done = []

        def script(*values):
            def measure(*_, **__):
                done.append(values[len(done)])
                return replace(run(20 + len(done), figure(done[-1])), platform=HERE, commit="f" * 40)

            monkeypatch.setattr(tracker, "measure", measure)
            return done

        return script

    def test_what_has_not_moved_runs_once(self, history, measured):
        done = measured(2.01)
        report = tracker.run(Path(), history)
        assert (report.outcome, len(done)) == ("good", 1)
        assert len(list(history.glob("*/*.json"))) == 13

    def test_a_jump_that_two_fresh_runs_confirm(self, history, measured):
        done = measured(2.6, 2.55, 2.65)
        report = tracker.run(Path(), history)
        assert report.counts == {"REGRESSION": 1}
        assert len(done) == 3
        assert len(list(history.glob("*/*.json"))) == 15, "all three are recorded"

    def test_a_jump_that_they_do_not(self, history, measured):
        done = measured(2.6, 2.0, 2.01)
        assert not tracker.run(Path(), history).counts.keys() & {"REGRESSION"}
        assert len(done) == 3

    def test_without_confirmation_it_stays_undecided(self, history, measured):
        done = measured(2.6)
        report = tracker.run(Path(), history, confirm=False)
        assert report.counts == {"INCONCLUSIVE": 1}
        assert len(done) == 1

    def test_what_was_left_out_on_purpose_is_not_missing(self, history, monkeypatch, run, figure):
        other = [replace(run(day, replace(figure(1.0), bench="other")), platform=HERE) for day in (20, 21)]
        monkeypatch.setattr(tracker, "measure", lambda *_, **__: other.pop())
        assert tracker.run(Path(), history).counts == {"MISSING": 1, "NO_BASELINE": 1}
        assert tracker.run(Path(), history, only="other").counts == {"NO_BASELINE": 1}


class TestJudged:
    def test_the_last_run(self, history):
        assert tracker.judged(history).record.started == sorted(p.name for p in history.glob("*/*.json"))[-1].split("-")[0]

    def test_none(self, tmp_path):
        with pytest.raises(DataError, match="no run is recorded there"):
            tracker.judged(tmp_path)
        with pytest.raises(DataError, match="no run of commit 1234567"):
            tracker.judged(tmp_path, commit="1234567")

    def test_an_entry_without_effect_is_said(self, history, capsys):
        entry = '[[accepted]]\nseries = "*"\nsince = "0123456"\nreason = "faster"\nauthor = "me"\n'
        (history.parent / "accepted.toml").write_text(entry)
        tracker.judged(history)
        assert "since 0123456: that commit was never measured here" in capsys.readouterr().out


class TestCommands:
    def invoke(self, *arguments):
        done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        return done.exit_code, done.output

    def test_report(self, history, tmp_path):
        places = {ending: tmp_path / "out" / f"p.{ending}" for ending in ("html", "md", "json")}
        options = ["--html", places["html"], "--markdown", places["md"], "--json", places["json"]]
        code, said = self.invoke("report", "--output", history, *options)
        assert code == 0
        assert all(f"written to {place}" in said.replace("\n", "") for place in places.values())
        assert "<svg" in places["html"].read_text()
        assert json.loads(places["json"].read_text())
        assert "|" in places["md"].read_text()

    def test_a_regression_is_exit_code_1(self, history, run, figure):
        for day in (20, 21, 22):
            record.write(replace(run(day, figure(2.7)), platform=HERE), history)
        assert self.invoke("report", "--output", history)[0] == 1

    def test_history(self, history):
        code, said = self.invoke("history", "--output", history)
        assert code == 0
        assert "12" in said
        assert self.invoke("history", "--output", history, "--only", "no such")[0] == 2

    @pytest.mark.parametrize(("after", "code"), [(1.3, 1), (1.0, 0)])
    def test_compare(self, run, figure, monkeypatch, tmp_path, after, code):
        base, head = ([run(i, figure(value + 0.001 * i, kind="time", unit="s")) for i in range(8)] for value in (1.0, after))
        asked = {}

        def compared(*trees, **settings):
            asked.update(settings, trees=[str(tree.root) for tree in trees[:2]])
            settings["tick"]()
            return compare.Comparison(
                base=tuple(base), head=tuple(head), judgements=tuple(judge.compare(base, head)), other_results=("step",)
            )

        monkeypatch.setattr(compare, "measurements", lambda pulse, only: [(pulse, only)])
        monkeypatch.setattr(compare, "compare", compared)
        options = ["--benchmarks", tmp_path, "--pairs", tmp_path / "pairs.jsonl", "--markdown", tmp_path / "compare.md"]
        found, said = self.invoke("compare", ROOT, ROOT, "--no-exact", *options)
        assert found == code
        assert ("REGRESSION" in said) == bool(code)
        assert "computes something else than in the base" in said
        assert asked["trees"] == [str(ROOT)] * 2
        assert asked["exact"] is None
        assert {values.shape for values in read_pairs(tmp_path / "pairs.jsonl").values()} == {(8, 2, 1)}
        assert "step" in (tmp_path / "compare.md").read_text()

    def test_what_cannot_be_compared_is_bad_input(self, tmp_path):
        (tmp_path / "pulse.py").write_text("PULSES = ()")
        code = CliRunner().invoke(app, ["bench", "compare", "HEAD", "--benchmarks", str(tmp_path)])
        assert "no measurement's name contains" in str(code.exception)
