"""The study of algorithms over seeds, with training, quantisation and ranks replaced by arithmetic; its bounds by the table of t."""

import json
from types import SimpleNamespace

import pytest

import nemo_opt.api as api
from nemo_opt.api.results import SweepRun
from nemo_opt.quantize.config import ALGORITHMS
from nemo_opt.testing import fixtures, ptq_study


def result(change, weights=None, activations=None):
    sqnr = {kind: {"median": value} for kind, value in (("weights", weights), ("activations", activations)) if value is not None}
    return SimpleNamespace(loss_before=5.0, loss_after=5.0 + change, sqnr=sqnr)


def test_a_bound_is_students_prediction_interval():
    bound = ptq_study.bounds_of([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(0.9995, 4) = 8.610 in any table; the standard deviation is sqrt(2.5)
    reach = 8.610 * 2.5**0.5 * 1.2**0.5
    assert (bound.low, bound.high) == (pytest.approx(3 - reach, abs=1e-3), pytest.approx(3 + reach, abs=1e-3))
    assert bound.values == [1.0, 2.0, 3.0, 4.0, 5.0]
    narrow = ptq_study.bounds_of([1.0, 2.0, 3.0, 4.0, 5.0], confidence=0.95)
    assert bound.low < narrow.low < 1
    constant = ptq_study.bounds_of([2.0, 2.0])
    assert (constant.low, constant.high) == (2.0, 2.0)


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    calls = []

    def train(**settings):
        calls.append(("train", settings))
        return SimpleNamespace(loss_after=5.0)

    def ptq_sweep(**settings):
        calls.append(("sweep", settings))
        seed = settings["data"].seed
        runs = {"fp8": SweepRun(result=result(0.001 * seed, 31.5 + seed, 31.0)), "int8": SweepRun(result=result(-0.001, 44.0))}
        return SimpleNamespace(runs={name: runs[name] for name in settings["algorithms"]})

    monkeypatch.setattr(api, "train", train, raising=False)
    monkeypatch.setattr(api, "ptq_sweep", ptq_sweep, raising=False)
    made = SimpleNamespace(root=tmp_path, facts={"versions": {"torch": "2"}})
    monkeypatch.setattr(fixtures, "build", lambda: made)
    monkeypatch.setattr(fixtures, "find", lambda: made)
    return calls


def run(tmp_path, algorithms):
    return ptq_study.study(root=str(tmp_path), folder=str(tmp_path / "study"), seeds=2, steps=20, algorithms=algorithms)


def test_each_seed_trains_and_is_measured(stubs, tmp_path):
    found = run(tmp_path, ["fp8", "int8"])
    assert found["fp8"]["loss_change"] == pytest.approx([0.001, 0.002])
    assert found["fp8"]["weights_db"] == [32.5, 33.5]
    assert found["int8"] == {"loss_change": pytest.approx([-0.001, -0.001]), "weights_db": [44.0, 44.0], "activations_db": []}
    (_, trained), (_, swept), (_, again), _ = stubs
    assert (trained["training"].seed, again["training"].seed) == (1, 2)
    assert (trained["data"].seed, trained["training"].max_steps, trained["training"].warmup_steps) == (1, 20, 2)
    assert trained["model"] == fixtures.RECIPE.teacher
    assert swept["checkpoint"] == trained["output"]
    assert (swept["export_format"], swept["quantization"], swept["data"].split) == (None, ptq_study.CALIBRATION, ptq_study.SPLIT)


def test_a_failure_ends_the_study(stubs, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "ptq_sweep", lambda **_: SimpleNamespace(runs={"fp8": SweepRun(error="no room")}), raising=False)
    with pytest.raises(AssertionError, match="fp8: no room"):
        run(tmp_path, ["fp8"])


def test_main_prints_the_table_and_writes_the_bounds(stubs, tmp_path, monkeypatch, capsys):
    started = {}

    def run_ranks(target, settings, *, devices):
        started.update(settings, target=target, devices=devices)
        return ptq_study.study(**settings)

    monkeypatch.setattr(ptq_study, "run_ranks", run_ranks)
    path = tmp_path / "bounds.json"
    assert ptq_study.main(["--seeds", "3", "--steps", "7", "--algorithms", "fp8", "int8", "--bounds", str(path)]) == 0
    assert (started["seeds"], started["steps"], started["devices"]) == (3, 7, 1)
    assert started["target"] == "nemo_opt.testing.ptq_study:study"
    lines = capsys.readouterr().out.splitlines()
    assert "| algorithm | loss_change | weights_db | activations_db |" in lines
    assert any(line.startswith("| fp8 | +0.00200 (bound ") for line in lines)
    written = json.loads(path.read_text())
    assert (written["origin"]["seeds"], written["origin"]["steps"], written["origin"]["versions"]) == (3, 7, {"torch": "2"})
    assert written["fp8"]["weights_db"]["values"] == [32.5, 33.5, 34.5]
    assert written["fp8"]["weights_db"]["low"] < 32.5 < 34.5 < written["fp8"]["weights_db"]["high"]
    assert set(written["int8"]) == {"loss_change", "weights_db"}, "what was not measured has no bound"


def test_bad_settings(capsys):
    with pytest.raises(SystemExit):
        ptq_study.main(["--seeds", "1"])
    assert "must be at least 2" in capsys.readouterr().err


def test_the_bounds_in_the_repository_are_of_all_algorithms_and_five_seeds():
    written = json.loads((ptq_study.BOUNDS).read_text())
    assert written["origin"]["seeds"] >= 5
    for algorithm in ALGORITHMS:
        for quantity in ("loss_change", "weights_db"):
            bound = written[algorithm][quantity]
            assert len(bound["values"]) == written["origin"]["seeds"]
            assert bound["low"] == pytest.approx(ptq_study.bounds_of(bound["values"]).low)
            assert bound["high"] == pytest.approx(ptq_study.bounds_of(bound["values"]).high)
    assert written["int4"]["weights_db"]["high"] < written["fp8"]["weights_db"]["low"] < written["int8"]["weights_db"]["low"]
