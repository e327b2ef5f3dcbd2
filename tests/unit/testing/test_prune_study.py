"""The study of importance against chance, with models, pruning and ranks replaced by arithmetic."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import nemo_opt._stack

import pytest
import torch

from nemo_opt.api import _session
from nemo_opt.checkpoint import load
from nemo_opt.models import build
from nemo_opt.prune import importance, search
from nemo_opt.testing import fixtures, prune_study
from nemo_opt.testing.prune_study import AxisStudy
from nemo_opt.training import forward

STUDY = AxisStudy(axis="ffn", unpruned=5.0, important=[5.1, 5.4], random=[[5.2, 5.4], [5.3, 5.3]])


@dataclass(frozen=True)
class Scores:
    hidden: torch.Tensor = field(default_factory=lambda: torch.arange(6.0))
    layers: torch.Tensor = field(default_factory=lambda: torch.tensor([4.0, 1.0, 2.0, 3.0]))
    ffn: dict[int, torch.Tensor] = field(default_factory=lambda: {1: torch.arange(3.0), 2: torch.arange(3.0)})
    heads: dict[int, torch.Tensor] = field(default_factory=lambda: {1: torch.arange(2.0)})
    groups: dict[int, torch.Tensor] = field(default_factory=dict)
    model: object = field(default_factory=lambda: SimpleNamespace(num_layers=4))


class Judge:
    """Loses what the scores of the layers and channels that go add up to."""

    def __init__(self, chunks, made):
        assert (chunks, made.root) == (["chunk"], Path("ROOT"))

    def importance(self, seed):
        return Scores()

    def loss(self, scores=None, targets=None):
        if targets is None:
            return 1.0
        truth, (size,) = Scores(), targets.values()
        name = "layers" if "num_layers" in targets else "hidden"
        order = getattr(scores, name).argsort(descending=True)
        return 1.0 + float(getattr(truth, name)[order[size:]].sum())


@pytest.fixture
def study(monkeypatch):
    @contextmanager
    def session(topology):
        yield SimpleNamespace(topology=topology)

    monkeypatch.setattr(_session, "session", session)
    monkeypatch.setattr(load, "restore_model", lambda path, topology: (["chunk"], None))
    monkeypatch.setattr(prune_study, "_Judge", Judge)
    monkeypatch.setitem(prune_study.TARGETS, "hidden", {"hidden_size": 3})
    return lambda **settings: prune_study.study(root="ROOT", **settings)


def test_summary():
    assert STUDY.gaps == pytest.approx([0.2, -0.1])
    summary = {"important_mean": 5.25, "random_mean": 5.3, "random_median": 5.3, "gap": 0.05, "seeds_won": 1, "choices_beaten": 0.75}
    assert STUDY.summary() == pytest.approx(summary)


def test_study(study):
    hidden, layers = study(seeds=3, axes=["hidden", "layers"], draws=5)
    assert (hidden.axis, hidden.unpruned, hidden.important) == ("hidden", 1.0, [1.0 + 0 + 1 + 2] * 3)
    assert [len(losses) for losses in hidden.random] == [5, 5, 5]
    assert len({tuple(losses) for losses in hidden.random}) == 3, "each seed has choices of its own"
    assert all(4.0 <= loss <= 13.0 for losses in hidden.random for loss in losses)
    assert layers.important == [2.0] * 3
    assert [sorted(losses) for losses in layers.random] == [[2.0, 3.0, 4.0, 5.0]] * 3, "all choices of three of four layers"
    assert study(seeds=3, axes=["hidden"], draws=5)[0] == hidden, "the same numbers every time"


def test_many_choices_of_layers_are_sampled(study, monkeypatch):
    monkeypatch.setattr(prune_study, "_FEW", 3)
    (layers,) = study(seeds=2, axes=["layers"], draws=3)
    assert [len(losses) for losses in layers.random] == [3, 3]


def test_chance_has_the_shapes_of_importance_and_nothing_of_its_values():
    scores = Scores()
    shuffled = prune_study._shuffled(scores, 7)
    assert shuffled.hidden.shape == (6,)
    assert list(shuffled.ffn) == [1, 2]
    assert not torch.equal(shuffled.ffn[1], shuffled.ffn[2])
    assert not torch.equal(shuffled.layers, scores.layers)
    assert torch.equal(shuffled.hidden, prune_study._shuffled(scores, 7).hidden)
    assert not torch.equal(shuffled.hidden, prune_study._shuffled(scores, 8).hidden)


def test_judge(monkeypatch):
    seen = []

    class Feed:
        def __init__(self, config, tokenizer, **settings):
            self.seed, self.settings = config.seed, settings

        def train_batches(self):
            return iter(range(100))

        def loss(self, chunks):
            return 5.0

    @contextmanager
    def pruned(model, scores, targets):
        seen.append((model, scores, targets))
        yield

    def measure_importance(chunks, loop):
        return chunks, loop

    def open_feed(config, tokenizer, **settings):
        feed = Feed(config, tokenizer, **settings)
        seen.append((feed.seed, settings))
        return feed

    monkeypatch.setattr(_session, "open_feed", open_feed)
    monkeypatch.setattr(importance, "measure_importance", measure_importance)
    monkeypatch.setattr(forward, "forward_loop", lambda batches, *, description: batches)
    monkeypatch.setattr(build, "unwrap", lambda chunks: chunks[0])
    monkeypatch.setattr(search, "pruned", pruned)
    judge = prune_study._Judge(["chunk"], fixtures.Fixtures(Path("ROOT")))
    assert judge.importance(7) == (["chunk"], list(range(8))), "64 samples in micro-batches of 8"
    assert seen[1] == (7, {"train_samples": 64, "eval_batches": 1})
    assert judge.loss() == 5.0
    assert len(seen) == 2
    assert judge.loss("scores", {"num_layers": 3}) == 5.0
    assert seen[2] == ("chunk", "scores", {"num_layers": 3})


def test_command(monkeypatch, tmp_path, capsys):
    def run_ranks(target, settings, *, devices):
        assert (target, devices) == ("nemo_opt.testing.prune_study:study", 1)
        assert settings == {"root": str(tmp_path), "seeds": 2, "draws": 2, "axes": ["ffn"]}
        return [STUDY]

    monkeypatch.setattr(fixtures, "build", lambda: fixtures.Fixtures(tmp_path))
    monkeypatch.setattr(prune_study, "run_ranks", run_ranks)
    arguments = ["--seeds", "2", "--draws", "2", "--axes", "ffn"]
    assert prune_study.main(arguments) == 0
    assert prune_study.main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
    written = json.loads((tmp_path / "s.json").read_text())["ffn"]
    assert written["random"] == STUDY.random
    assert (written["seeds_won"], written["gap"]) == (1, pytest.approx(0.05))
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["ffn", "5.2500", "5.3000", "5.3000", "+0.0500", "1/2", "75", "%", "of", "4"]
    with pytest.raises(SystemExit):
        prune_study.main(["--draws", "0"])
