"""Verdicts of the quickstart (each with a case that must fail), its report, and the command with the ranks replaced."""

import json
import re
from dataclasses import asdict, replace

import pytest

from nemo_opt.api.results import DistillResult, EvalResult, ExportResult, PruneResult, PtqResult
from nemo_opt.errors import ConfigError
from nemo_opt.testing import fixtures, quickstart
from nemo_opt.testing.quickstart_report import plot, print_table, write_html

FACTS = {"path": "OUT", "layout": "TP2PP1", "spec": "te", "device": "cpu/gloo", "parameters": 1_000_000, "time_s": 2.5}
PTQ = PtqResult(
    **FACTS, algorithm="fp8", export_format="nemo", quantizers=32,
    loss_before=5.0, loss_after=5.01, bytes_before=4_000_000, bytes_after=4_100_000,
)  # fmt: skip
PRUNE = PruneResult(
    **FACTS,
    loss_before=5.0,
    loss_after=5.4,
    parameters_before=2_000_000,
    model_before={"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 4},
    model_after={"hidden_size": 96, "ffn_hidden_size": 192, "num_layers": 2},
)
DISTILL = DistillResult(
    **FACTS, steps=5, teacher="T", teacher_loss=5.0, loss_before=5.4, loss_after=5.1, kd_loss_first=0.5, kd_loss_last=0.2, tokens_per_s=1.0
)
EVAL = EvalResult(**FACTS, loss=5.0, tokens=8192)
NAN = float("nan")


@pytest.fixture
def made(tmp_path):
    root = tmp_path / "fixtures"
    root.mkdir()
    facts = {"loss_uniform": 7.62, "teacher": {"steps": 240}, "time_s": 60.0, "versions": {"torch": "2.13.0"}}
    (root / "fixtures.json").write_text(json.dumps(facts))
    return fixtures.Fixtures(root)


def test_teacher(made):
    row = quickstart._teacher_row(made, EVAL)
    assert row.good
    assert (row.loss_before, row.loss_after, row.time_s) == (7.62, 5.0, 60.0)
    for loss in (5.7, 7.62, NAN):
        assert not quickstart._teacher_row(made, replace(EVAL, loss=loss)).good


def test_ptq():
    assert quickstart._ptq_row("FP8", PTQ, 5.0).good
    for bad in (
        replace(PTQ, loss_after=5.2),  # a wrong scale
        replace(PTQ, loss_after=5.0),  # nothing was quantised
        replace(PTQ, loss_after=NAN),
        replace(PTQ, quantizers=0),
        replace(PTQ, loss_before=5.1),  # another model, or other samples
    ):
        assert not quickstart._ptq_row("FP8", bad, 5.0).good


def test_reload_and_export():
    assert quickstart._reload_row("x", EVAL, 5.000005).good
    assert not quickstart._reload_row("x", EVAL, 5.001).good
    assert quickstart._reload_row("x", EVAL, 5.001, 0.01).good
    assert not quickstart._reload_row("x", replace(EVAL, loss=NAN), 5.0).good
    row = quickstart._export_row(EVAL, 5.0, 1.5)
    assert (row.good, row.time_s) == (True, 4.0)
    assert not quickstart._export_row(EVAL, 5.1, 1.5).good


def test_prune():
    row = quickstart._prune_row(PRUNE)
    assert row.good
    assert row.size == "2 M -> 1 M"
    assert not quickstart._prune_row(replace(PRUNE, model_after=PRUNE.model_before)).good
    assert not quickstart._prune_row(replace(PRUNE, parameters=2_000_000)).good
    assert not quickstart._prune_row(replace(PRUNE, loss_after=NAN)).good


def test_distill():
    row = quickstart._distill_row(DISTILL)
    assert row.good
    assert "75 % of the way" in row.verdict
    assert not quickstart._distill_row(replace(DISTILL, loss_after=5.39)).good
    assert not quickstart._distill_row(replace(DISTILL, loss_after=5.5)).good
    assert not quickstart._distill_row(replace(DISTILL, kd_loss_last=0.6)).good
    assert not quickstart._distill_row(replace(DISTILL, loss_after=NAN)).good


@pytest.fixture
def record(made):
    rows = [asdict(quickstart._teacher_row(made, EVAL)), asdict(quickstart._ptq_row("a <b> & c", replace(PTQ, quantizers=0), 5.0))]
    return {"rows": rows, "good": False, "time_s": 12.0, "goal_s": 480, "fixtures": "F", "versions": {"torch": "2.13.0"}}


def test_table(record, tmp_path, capsys):
    print_table(record, tmp_path, page=tmp_path / "p.html", result=tmp_path / "r.json")
    output = capsys.readouterr().out
    for text in ("TP2PP1", "7.6200 -> 5.0000", "BAD", "2 steps in 12 s (goal: 480 s)", str(tmp_path / "p.html"), str(tmp_path / "r.json")):
        assert text in output


def test_page_is_whole_and_self_contained(record, tmp_path):
    page = tmp_path / "p.html"
    write_html(record, page)
    text = page.read_text()
    assert "a &lt;b&gt; &amp; c" in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 1
    body = re.sub(r"https?://(www\.w3\.org|matplotlib\.org|purl\.org|creativecommons\.org)/", "", text)  # names, which nothing loads
    for foreign in ("<script", "<link", "http://", "https://", "@import"):
        assert foreign not in body
    assert "A step failed its verdict" in text


def test_page_without_matplotlib(record, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot(record["rows"]) == ""
    write_html(record, tmp_path / "p.html")
    assert "<svg" not in (tmp_path / "p.html").read_text()


class TestSteps:
    """The steps with the API replaced by canned results: who gets whose output, where, and what comes of it."""

    @pytest.fixture
    def calls(self, monkeypatch):
        from nemo_opt import api

        calls = []
        exported = ExportResult(**FACTS | {"path": "HF"}, source="D", bytes_after=1)
        results = {"ptq": PTQ, "prune": replace(PRUNE, path="PRUNED"), "distill": replace(DISTILL, path="D"), "export_ckpt": exported}
        # in order: the teacher, the FP8 model elsewhere, the export in transformers
        losses = iter([5.0, PTQ.loss_after, DISTILL.loss_after])

        def recorder(name):
            def call(**settings):
                print("a long table of ModelOpt's")
                calls.append((name, settings))
                return replace(EVAL, loss=next(losses)) if name == "evaluate" else results[name]

            return call

        for name in ("evaluate", *results):
            monkeypatch.setattr(api, name, recorder(name))
        return calls

    def test_each_step_builds_on_the_one_before(self, made, calls, tmp_path, capsys):
        rows = quickstart.run_steps(root=str(made.root), output=str(tmp_path), steps=5)
        assert [row.good for row in rows] == [True] * 7
        assert [(name, settings["topology"].name) for name, settings in calls] == [
            ("evaluate", "TP2PP1"),
            ("ptq", "TP2PP1"),
            ("evaluate", "TP1PP2"),
            ("ptq", "TP1PP2"),
            ("prune", "TP1PP2"),
            ("distill", "TP1PP2"),
            ("export_ckpt", "TP2PP1"),
            ("evaluate", "TP1PP1"),
        ]
        by_step = [settings for _, settings in calls]
        assert by_step[0]["path"] == by_step[1]["checkpoint"] == by_step[4]["checkpoint"] == by_step[5]["teacher"] == str(made.teacher)
        assert (by_step[2]["path"], by_step[5]["student"], by_step[6]["checkpoint"], by_step[7]["path"]) == ("OUT", "PRUNED", "D", "HF")
        assert by_step[3]["spec"] == "local"
        # every loss is measured on the same 64 samples
        assert by_step[5]["data"].micro_batch_size * by_step[5]["eval_batches"] == 64
        assert by_step[7]["data"].micro_batch_size * by_step[7]["eval_batches"] * 2 == 64
        output = capsys.readouterr().out
        assert "pruning at PP2" in output
        assert "a long table" not in output
        assert "a long table" in (tmp_path / "quickstart.log").read_text()

    def test_a_bad_step_does_not_hide(self, made, calls, tmp_path, monkeypatch):
        from nemo_opt import api

        monkeypatch.setattr(api, "distill", lambda **_: replace(DISTILL, loss_after=5.39))
        rows = quickstart.run_steps(root=str(made.root), output=str(tmp_path), steps=5)
        assert [row.good for row in rows] == [True] * 5 + [False] * 2


class TestCommand:
    @pytest.fixture
    def rows(self, made, monkeypatch):
        rows = [quickstart._teacher_row(made, EVAL), quickstart._prune_row(PRUNE)]
        monkeypatch.setattr(fixtures, "build", lambda: made)
        monkeypatch.setattr(quickstart, "run_ranks", lambda target, settings, devices: rows)
        return rows

    def test_good(self, rows, tmp_path, capsys):
        output = tmp_path / "out"
        assert quickstart.main(output) == 0
        record = json.loads((output / "quickstart.json").read_text())
        assert record["good"]
        assert [row["what"] for row in record["rows"]] == ["teacher, 240 steps", "teacher, pruned"]
        assert (output / "quickstart.html").is_file()
        assert str(output / "quickstart.html") in capsys.readouterr().out

    def test_one_bad_verdict_fails_it(self, rows, tmp_path):
        rows.append(quickstart._distill_row(replace(DISTILL, loss_after=5.5)))
        assert quickstart.main(tmp_path / "out") == 1

    def test_no_rows_is_no_success(self, rows, tmp_path):
        rows.clear()
        assert quickstart.main(tmp_path / "out") == 1

    def test_again_in_the_same_place(self, rows, tmp_path):
        output = tmp_path / "out"
        quickstart.main(output)
        (output / "pruned").mkdir()
        (output / "mine").touch()
        assert quickstart.main(output) == 0
        assert not (output / "pruned").exists()
        assert (output / "mine").exists()

    def test_foreign_directory(self, rows, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="holds no earlier quickstart"):
            quickstart.main(tmp_path)
