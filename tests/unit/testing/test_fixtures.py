"""The cache of fixtures, with the ranks replaced by a writer of small files: keys, locks, damage, races."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opt.api.results import TrainResult
from nemo_opt.errors import ConfigError, NemoOptError
from nemo_opt.testing import fixtures
from nemo_opt.testing.fixtures import RECIPE, Fixtures

UNIFORM = 7.6246189861593985


def result(path, loss):
    facts = {"layout": "TP1PP1DP2", "spec": "te", "device": "cpu/gloo", "parameters": 10, "time_s": 1.0, "steps": 3}
    return TrainResult(path=str(path), **facts, loss_first=7.6, loss_last=5.0, loss_after=loss, loss_uniform=UNIFORM, tokens_per_s=1.0)


class Ranks:
    """Stands in for `run_ranks`: writes what the ranks would, and counts."""

    def __init__(self, loss=5.0, wait_s=0.0):
        self.loss, self.wait_s, self.calls = loss, wait_s, 0

    def __call__(self, target, kwargs, *, devices):
        assert target == "nemo_opt.testing.fixtures:make"
        self.calls += 1
        root = Path(kwargs["root"])
        time.sleep(self.wait_s)
        for name in ("teacher", "student", "teacher-hf", "indices"):
            (root / name).mkdir()
            (root / name / "weights").write_text(name)
        return {name: result(root / name, self.loss) for name in ("teacher", "student")}


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    fake = Ranks()
    monkeypatch.setenv("NEMO_OPT_FIXTURES", str(tmp_path / "fixtures"))
    monkeypatch.setattr(fixtures, "run_ranks", fake)
    monkeypatch.setattr(fixtures, "_write_text", lambda made, recipe: made.corpus.parent.mkdir())
    return fake


def test_made_once_and_complete(ranks, capsys):
    made = fixtures.build()
    assert fixtures.build() == made == fixtures.find()
    assert ranks.calls == 1
    assert made.root.parent == Path(os.environ["NEMO_OPT_FIXTURES"])
    expected = {"teacher", "student", "teacher-hf", "data", "fixtures.json", "manifest.json"}
    assert {path.name for path in made.root.iterdir()} == expected
    assert made.facts["loss_uniform"] == pytest.approx(UNIFORM)
    assert made.facts["teacher"]["loss_after"] == 5.0
    assert "path" not in made.facts["teacher"], "it would name the unfinished directory"
    assert not [path for path in made.root.parent.iterdir() if ".part-" in path.name]
    assert "making fixtures" in capsys.readouterr().err


def test_show(ranks, capsys):
    made = fixtures.build(quiet=True)
    fixtures.show(made)
    output = capsys.readouterr()
    assert output.err == ""
    for text in ("teacher", "student", "teacher-hf", "5.0000", str(made.root), "7.6246"):
        assert text in output.out


def test_key_depends_on_recipe_versions_and_corpus(monkeypatch):
    key = fixtures._key(RECIPE)
    assert fixtures._key(replace(RECIPE, lr=1e-2)) != key
    assert fixtures._key(RECIPE) == key
    monkeypatch.setattr(fixtures, "version", lambda name: "0")
    changed = fixtures._key(RECIPE)
    assert changed != key
    monkeypatch.setattr(fixtures, "corpus_fingerprint", lambda: "other")
    assert fixtures._key(RECIPE) not in (key, changed)


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.delenv("NEMO_OPT_FIXTURES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fixtures._home() == tmp_path / "nemo_opt" / "fixtures"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fixtures._home() == Path.home() / ".cache" / "nemo_opt" / "fixtures"


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "add", "manifest"])
def test_damage_is_named_and_mended(ranks, capsys, damage):
    made = fixtures.build()
    victim = made.teacher / "weights"
    match damage:
        case "truncate":
            victim.write_text("t")
        case "alter":
            victim.write_text("TEACHER")
        case "remove":
            victim.unlink()
        case "add":
            (made.teacher / "extra").touch()
        case "manifest":
            (made.root / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="nemo-opt fixtures build"):
        fixtures.find()
    capsys.readouterr()
    assert fixtures.build() == made
    assert ranks.calls == 2
    made.verify()
    named = {"add": "extra", "manifest": "manifest.json"}.get(damage, "weights")
    assert f"{named}" in capsys.readouterr().err


def test_missing(ranks):
    with pytest.raises(ConfigError, match="nemo-opt fixtures build"):
        fixtures.find()


@pytest.mark.parametrize("loss", [6.0, None, float("nan")])
def test_a_teacher_that_has_not_learnt_is_refused(ranks, loss):
    ranks.loss = loss
    with pytest.raises(NemoOptError, match="train it longer"):
        fixtures.build()
    assert not list(Path(os.environ["NEMO_OPT_FIXTURES"]).glob("[!.]*")), "nothing half made is left"


def test_leftovers_of_a_killed_build_are_removed(ranks):
    root = Path(os.environ["NEMO_OPT_FIXTURES"]) / fixtures._key(RECIPE)
    stale = root.with_name(f".{root.name}.part-x")
    stale.mkdir(parents=True)
    fixtures.build()
    assert not stale.exists()


def test_two_builders_at_once(ranks):
    """Threads stand for processes: a file lock belongs to the open file, and each builder opens its own."""
    ranks.wait_s = 0.1
    builders = [threading.Thread(target=lambda: fixtures.build(quiet=True).verify(), daemon=True) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(timeout=30)
        assert not builder.is_alive()
    assert ranks.calls == 1, "one makes them, the other waits and finds them"
    fixtures.find()


def test_waiting_is_said(ranks, capsys):
    import fcntl

    root = Path(os.environ["NEMO_OPT_FIXTURES"]) / "key"
    with fixtures._lock(root, quiet=False):
        with root.with_name(".key.lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other = threading.Thread(target=_hold_lock, args=(root,), daemon=True)
        other.start()
        other.join(timeout=0.2)
        assert other.is_alive()
    other.join(timeout=30)
    assert not other.is_alive()
    assert "another process is making the fixtures" in capsys.readouterr().err


def _hold_lock(root):
    with fixtures._lock(root, quiet=False):
        pass


def test_text(tmp_path):
    recipe = replace(RECIPE, teacher=RECIPE.teacher.with_(vocab_size=300))
    made = Fixtures(tmp_path)
    fixtures._write_text(made, recipe)
    assert json.loads(made.corpus.read_text().splitlines()[0])["text"]
    from nemo_opt.data.tokenizer import load_tokenizer

    assert load_tokenizer(made.tokenizer).vocab_size == 300


def test_making_on_one_rank(tmp_path):
    """The real thing, small: one layer, two steps."""
    narrow = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 2}
    tiny = RECIPE.teacher.with_(vocab_size=300, num_layers=1, **narrow)
    sizes = {"teacher": tiny, "student": tiny.with_(ffn_hidden_size=16)}
    recipe = replace(RECIPE, **sizes, teacher_steps=2, student_steps=1, seq_length=16, global_batch_size=2)
    made = Fixtures(tmp_path)
    fixtures._write_text(made, recipe)
    results = fixtures.make(str(tmp_path), recipe)
    assert (results["teacher"].steps, results["student"].steps) == (2, 1)
    assert results["teacher"].parameters > results["student"].parameters
    from nemo_opt.checkpoint.info import verify

    assert verify(made.teacher).model == tiny
    assert not verify(made.teacher).has_optimizer
    assert (made.teacher_hf / "config.json").is_file()
    assert Path(f"{made.dataset}.idx").is_file()
