"""The study of distillation against labels, with models, training and ranks replaced by arithmetic."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import nemo_opt._stack

import pytest

import nemo_opt.api as api
import nemo_opt.distill as distill
from nemo_opt.api import _session
from nemo_opt.checkpoint import load
from nemo_opt.testing import distill_study, fixtures
from nemo_opt.testing.distill_study import SETTINGS, TUNING_SEED, WAYS, Setting, Study, Way
from nemo_opt.training import loop

FOUND = Study(
    teacher_steps=240,
    teacher_loss=5.0,
    points=[2, 4],
    before=[5.5, 5.75],
    ways={
        "labels": Way(lr=1e-3, curves=[[5.375, 5.25], [5.5, 5.3125]]),
        "logits": Way(lr=2e-3, curves=[[5.25, 5.125], [5.25, 5.25]]),
    },
)


def test_margins_are_taken_seed_by_seed():
    assert FOUND.ways["labels"].finals == [5.25, 5.3125]
    assert FOUND.margins("logits") == [0.125, 0.0625]
    assert FOUND.margins("labels") == [0.0, 0.0]


def test_summary():
    assert FOUND.summary("logits") == pytest.approx(
        {
            "loss": 5.1875,
            "loss_sd": 0.0625 * 2**0.5,
            "margin": 0.09375,
            "margin_sd": 0.03125 * 2**0.5,
            "margin_least": 0.0625,
            "seeds_won": 2,
            "closed": (0.375 / 0.5 + 0.5 / 0.75) / 2,
        }
    )
    assert FOUND.summary("labels")["seeds_won"] == 0
    one = replace(FOUND, before=[5.5], ways={name: replace(way, curves=way.curves[:1]) for name, way in FOUND.ways.items()})
    assert (one.summary("logits")["loss_sd"], one.summary("logits")["margin"]) == (0.0, 0.125)


# ---------------------------------------------------------------------------------------------------------------- in the rank


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """Calls of what trains; a student's loss is 5, and more the farther the learning rate is from the best one of its way."""
    calls = SimpleNamespace(pruned=[], trained=[])

    @contextmanager
    def session(topology, *, seed):
        calls.seed = seed
        yield SimpleNamespace(topology=topology)

    def prune(**settings):
        Path(settings["output"]).mkdir()
        calls.pruned.append(settings)

    def open_feed(data, tokenizer, **sizes):
        return SimpleNamespace(train_batches=("train", data.seed, sizes), valid_batches=("valid", data.seed, sizes))

    def train(chunks, *, config, topology, loss_fn, train_batches, valid_batches_fn):
        calls.trained.append(SimpleNamespace(chunks=chunks, config=config, loss_fn=loss_fn, train=train_batches, valid=valid_batches_fn))
        best = 1e-3 if loss_fn is None else 4e-3
        loss = 5.0 + abs(config.lr - best)
        steps = range(config.val_check_interval, config.max_steps + 1, config.val_check_interval)
        return SimpleNamespace(validation_losses={step: loss + (config.max_steps - step) for step in {*steps, config.max_steps}})

    monkeypatch.setattr(_session, "session", session)
    monkeypatch.setattr(_session, "open_feed", open_feed)
    monkeypatch.setattr(load, "restore_model", lambda path, topology: ([Path(path).name], None))
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(api, "prune", prune, raising=False)
    monkeypatch.setattr(api, "evaluate", lambda *, path, **_: SimpleNamespace(loss=4.5 if path.endswith("teacher") else 5.5), raising=False)
    monkeypatch.setattr(distill, "teacher_provider", lambda config, path: f"the {path.name}", raising=False)
    monkeypatch.setattr(distill, "convert_to_distillation_model", lambda *parts: list(parts), raising=False)
    monkeypatch.setattr(distill, "distillation_loss_fn", "distillation", raising=False)
    settings = {"root": "ROOT", "folder": str(tmp_path), "teacher_steps": 240, "steps": 10, "seeds": 2, "grid": []}
    return SimpleNamespace(study=lambda **changes: distill_study.study(**settings | changes), calls=calls)


def test_each_seed_prunes_and_trains_in_each_way_on_the_same_samples(rank):
    found = rank.study(lr={"labels": 1e-3, "logits": 4e-3})
    assert (found.teacher_steps, found.teacher_loss, found.before, found.points) == (240, 4.5, [5.5, 5.5], [2, 4, 6, 8, 10])
    assert {way: results.lr for way, results in found.ways.items()} == {"labels": 1e-3, "logits": 4e-3}
    assert found.ways["logits"].curves == [[13.0, 11.0, 9.0, 7.0, 5.0]] * 2
    assert [(call["data"].seed, call["output"][-7:]) for call in rank.calls.pruned] == [(1, "pruned1"), (2, "pruned2")]
    assert rank.calls.pruned[0]["pruning"].targets == {"hidden_size": 96, "ffn_hidden_size": 192, "num_layers": 2}
    labels, logits = rank.calls.trained[:2], rank.calls.trained[2:]
    assert [run.chunks for run in labels] == [["pruned1"], ["pruned2"]]
    assert [run.loss_fn for run in labels] == [None, None]
    assert [run.chunks[:2] for run in logits] == [[["pruned1"], "the teacher"], [["pruned2"], "the teacher"]]
    assert [run.loss_fn for run in logits] == ["distillation"] * 2
    assert [run.train for run in labels] == [run.train for run in logits] == [("train", n, labels[0].train[2]) for n in (1, 2)]
    assert labels[0].train[2]["train_samples"] == 80
    assert {run.valid[:2] for run in rank.calls.trained} == {("valid", fixtures.RECIPE.seed)}, "one set of validation samples"
    config = logits[0].config
    assert (config.lr, config.min_lr, config.warmup_steps, config.max_steps) == (4e-3, 4e-4, 1, 10)


def test_ways_differ_in_their_settings_only(rank):
    rank.study(lr=dict.fromkeys(WAYS, 1e-3), seeds=1)
    _, logits, hidden, labels_too = (run.chunks[-1] for run in rank.calls.trained)
    assert (logits.skip_lm_loss, list(logits.intermediate_layer_pairs)) == (True, [])
    assert (hidden.skip_lm_loss, list(hidden.intermediate_layer_pairs)) == (True, [("decoder.final_layernorm",) * 2])
    assert (labels_too.skip_lm_loss, list(labels_too.intermediate_layer_pairs)) == (False, [])


def test_the_last_step_is_measured_whatever_the_number_of_steps(rank):
    assert rank.study(lr={"labels": 1e-3}, steps=3, seeds=1).points == [1, 2, 3]
    assert rank.study(lr={"labels": 1e-3}, steps=12, seeds=1).points == [2, 4, 6, 8, 10, 12]
    assert rank.study(lr={"labels": 1e-3}, steps=13, seeds=1).points == [2, 4, 6, 8, 10, 12, 13]


def test_each_way_gets_its_best_learning_rate_from_a_seed_of_its_own(rank, capsys):
    found = rank.study(lr={"labels": 1.0, "logits": 1.0}, grid=[1e-3, 2e-3, 4e-3])
    assert {way: results.lr for way, results in found.ways.items()} == {"labels": 1e-3, "logits": 4e-3}
    tuned, studied = rank.calls.trained[:6], rank.calls.trained[6:]
    assert {run.train[1] for run in tuned} == {TUNING_SEED}
    assert {run.train[1] for run in studied} == {1, 2}
    assert "labels: 0.001 5.0000, 0.002 5.0010, 0.004 5.0030" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- what is shown


def test_every_setting_has_a_learning_rate_of_the_grid_for_each_way():
    for setting in SETTINGS.values():
        assert setting.lr.keys() == WAYS.keys()
        assert set(setting.lr.values()) <= set(distill_study.GRID)
        assert distill_study.GRID[0] < min(setting.lr.values()) <= max(setting.lr.values()) <= distill_study.GRID[-1]


@pytest.fixture
def command(monkeypatch, tmp_path):
    calls = []

    def run_ranks(target, settings, *, devices):
        assert (target, devices) == ("nemo_opt.testing.distill_study:study", 1)
        calls.append(settings)
        return FOUND

    def build(recipe):
        calls.append(recipe)
        return fixtures.Fixtures(tmp_path / "made")

    monkeypatch.setattr(fixtures, "build", build)
    monkeypatch.setattr(distill_study, "run_ranks", run_ranks)
    monkeypatch.setitem(
        SETTINGS, "half_trained", Setting(teacher_steps=7, steps=40, lr={"labels": 1e-3, "logits": 2e-3, "logits_hidden": 3e-3})
    )
    return calls


def test_command(command, tmp_path, capsys):
    files = ["--json", str(tmp_path / "s.json"), "--svg", str(tmp_path / "s.svg")]
    assert distill_study.main(["--settings", "half_trained", "--ways", "logits", "--seeds", "2", *files]) == 0
    recipe, settings = command
    assert (recipe.teacher_steps, recipe.seed) == (7, fixtures.RECIPE.seed)
    assert settings.pop("folder")
    assert settings == {
        "root": str(tmp_path / "made"), "teacher_steps": 7, "steps": 40, "seeds": 2, "lr": {"labels": 1e-3, "logits": 2e-3}, "grid": [],
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "half_trained: teacher 5.0000 after 240 steps, pruned 5.6250; 4 steps, 2 seeds" in lines
    assert "| labels | 0.001 | 5.4375 | 5.2812 ± 0.0442 | | |  | 54 % |" in lines
    assert "| logits | 0.002 | 5.2500 | 5.1875 ± 0.0884 | +0.0938 ± 0.0442 | +0.0625 | 2 of 2 | 71 % |" in lines
    written = json.loads((tmp_path / "s.json").read_text())["half_trained"]
    assert (written["points"], written["before"]) == ([2, 4], [5.5, 5.75])
    assert (written["ways"]["logits"]["curves"], written["ways"]["logits"]["margins"]) == (FOUND.ways["logits"].curves, [0.125, 0.0625])
    assert (written["ways"]["logits"]["margin_least"], written["ways"]["logits"]["seeds_won"]) == (0.0625, 2)
    assert (tmp_path / "s.svg").read_text() == distill_study.draw({"half_trained": FOUND})


def test_command_with_other_steps_another_teacher_and_the_grid(command):
    assert distill_study.main(["--settings", "half_trained", "--steps", "3", "--teacher-seed", "9", "--grid"]) == 0
    recipe, settings = command
    assert recipe == replace(fixtures.RECIPE, teacher_steps=7, seed=9)
    assert (settings["steps"], settings["seeds"], settings["grid"]) == (3, 5, list(distill_study.GRID))


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--steps", "1"], ["--settings", "other"], ["--ways", "other"]])
def test_bad_settings(command, arguments):
    with pytest.raises(SystemExit):
        distill_study.main(arguments)
    assert not command


def test_a_drawing_stands_alone_on_light_and_dark_screens():
    svg = distill_study.draw({"half_trained": FOUND, "finished": replace(FOUND, teacher_steps=1000)})
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    assert "half trained: teacher of 240 steps, student of 4" in text
    assert "finished: teacher of 1000 steps, student of 4" in text
    assert "prefers-color-scheme: dark" in text
    used, defined = set(re.findall(r"var\((--\w+)\)", svg)), re.findall(r"(--\w+):", svg)
    assert used <= set(defined)
    assert all(defined.count(name) == 2 for name in used), "once for light, once for dark"
    assert not re.findall(r"href=\"(?!#)|<script", svg), "nothing is loaded from elsewhere"
