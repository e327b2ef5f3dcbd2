"""Goldens: what is recorded, and everything that a comparison with them must turn red for."""

import json
import math

import pytest

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.testing import assertions, goldens

LOSSES = {1: 7.5, 2: 7.25, 3: 7.0}


def _write(path, losses, **others):
    """A metrics.jsonl with a loss a step."""
    path.write_text("".join(json.dumps({"step": step, "loss": loss, "time_s": 0.1} | others) + "\n" for step, loss in losses.items()))
    return path


@pytest.fixture
def repeats(tmp_path):
    """Six runs, which differ by 1e-3 nats in their second step and by 1e-6 elsewhere."""
    runs = [{1: 7.5 + i * 2e-7, 2: 7.25 + i * 2e-4, 3: 7.0 + i * 2e-7} for i in range(6)]
    return [_write(tmp_path / f"run{i}.jsonl", run) for i, run in enumerate(runs)]


def _record(repeats, folder, **changes):
    return goldens.record("tiny", repeats, **{"keys": ["loss"], "varied": "threads", "folder": folder} | changes)


@pytest.fixture
def folder(repeats, tmp_path):
    """With one golden, `tiny`."""
    _record(repeats, tmp_path / "goldens")
    return tmp_path / "goldens"


def _compare(folder, result):
    return goldens.main(["--folder", str(folder), "compare", "tiny", str(result)])


def _change(folder, change):
    """The golden's file with something else in it."""
    path = folder / "tiny.json"
    content = json.loads(path.read_text())
    change(content["platforms"][goldens.platform_key()])
    path.write_text(json.dumps(content))


def test_what_was_recorded(folder):
    golden = goldens.read_golden("tiny", folder)
    assert golden.repeats == 6
    assert golden.versions["torch"]
    assert "10 times the largest relative spread of a key over 6 repeats" in golden.tolerance_origin
    assert golden.tolerance_origin.endswith("Repeats differed in: threads")
    assert list(golden.values) == ["loss of step 1", "loss of step 2", "loss of step 3"]
    first = golden.values["loss of step 1"]
    assert (first.value, first.spread) == pytest.approx((7.5 + 4e-7, 1e-6))
    # That of the key, not of the step: one step's alone may be small by chance.
    assert first.tolerance / first.value == pytest.approx(10 * 1e-3 / 7.251, rel=1e-4)


def test_an_equal_run_passes_and_is_recorded_as_asserted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(assertions.VARIABLE, str(tmp_path / "asserted"))
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES)) == 0
    assert "ok   loss of step 1 = 7.5" in capsys.readouterr().out
    found = assertions.read(tmp_path / "asserted")
    assert [(a.kind, a.holds, a.source) for a in found] == [("golden", True, "tiny")] * 3


@pytest.mark.parametrize("change", [0.02, -0.02], ids=["worse", "better"])
def test_a_shifted_value(folder, tmp_path, change, monkeypatch, capsys):
    monkeypatch.setenv(assertions.VARIABLE, str(tmp_path / "asserted"))
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES | {2: 7.25 + change})) == 1
    out = capsys.readouterr().out
    assert f"FAIL loss of step 2 = {7.25 + change!r}" in out
    assert "If the change is meant, record it there with tests/functional/record_goldens.sh" in out
    assert [a.holds for a in assertions.read(tmp_path / "asserted")] == [True, False, True]


def test_a_run_that_is_one_step_off(folder, tmp_path, capsys):
    stale = {1: 7.7, 2: LOSSES[1], 3: LOSSES[2]}
    assert _compare(folder, _write(tmp_path / "new.jsonl", stale)) == 1
    assert capsys.readouterr().out.count("FAIL") == 3


def test_a_golden_of_other_code(folder, tmp_path, capsys):
    """Its numbers moved, and a library with them: the message says which."""

    def age(platform):
        platform["versions"]["torch"] = "0.0.1"
        for entry in platform["values"].values():
            entry["value"] += 0.5

    _change(folder, age)
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES)) == 1
    assert "since then changed: torch 0.0.1 -> " in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number(folder, tmp_path, value, capsys):
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES | {3: value})) == 1
    assert f"FAIL loss of step 3 = {value!r}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({1: 7.5, 2: 7.25}, "lacks 'loss of step 3' (and 0 more) of the golden"),
        (LOSSES | {4: 6.5}, "the golden lacks 'loss of step 4'"),
        ({1: None, 2: None, 3: None}, "has no number 'loss'"),
        ({}, "holds no number"),
    ],
    ids=["a step too few", "a step too many", "no metric", "empty"],
)
def test_what_is_on_one_side_only(folder, tmp_path, losses, message, monkeypatch, capsys):
    monkeypatch.setenv(assertions.VARIABLE, str(tmp_path / "asserted"))
    assert _compare(folder, _write(tmp_path / "new.jsonl", losses)) == 2
    assert message in capsys.readouterr().err
    assert [a.holds for a in assertions.read(tmp_path / "asserted")] == [False]


def test_another_platform(folder, tmp_path, monkeypatch, capsys):
    known = goldens.platform_key()
    monkeypatch.setattr(goldens.platform, "machine", lambda: "riscv64")
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES)) == 2
    error = capsys.readouterr().err
    assert f"knows ['{known}'], not " in error
    assert "riscv64" in error
    assert "record it there with" in error


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"platforms": []}', "null"])
def test_an_empty_golden(folder, tmp_path, content, capsys):
    (folder / "tiny.json").write_text(content)
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES)) == 2
    assert "tiny.json is no golden" in capsys.readouterr().err


def test_no_golden_and_no_result(folder, tmp_path, capsys):
    assert _compare(tmp_path, _write(tmp_path / "new.jsonl", LOSSES)) == 2
    assert "record it there" in capsys.readouterr().err
    assert _compare(folder, tmp_path / "absent.json") == 2
    assert "is no result (FileNotFoundError" in capsys.readouterr().err


def _without_tolerance(platform):
    del platform["values"]["loss of step 2"]["tolerance"]


@pytest.mark.parametrize(
    "change",
    [
        _without_tolerance,
        lambda platform: platform["values"]["loss of step 2"].update(tolerance=math.inf),
        lambda platform: platform["values"]["loss of step 2"].update(tolerance=-1.0),
        lambda platform: platform["values"]["loss of step 2"].update(value=math.nan),
        lambda platform: platform.update(values={}),
        lambda platform: platform.update(keys=[]),
        lambda platform: platform.update(repeats=4),
        lambda platform: platform.update(tolerance_origin=""),
    ],
    ids=["no tolerance", "infinite tolerance", "negative tolerance", "NaN", "no values", "no keys", "few repeats", "no origin"],
)
def test_a_golden_that_proves_nothing(folder, tmp_path, change, capsys):
    _change(folder, change)
    assert _compare(folder, _write(tmp_path / "new.jsonl", LOSSES)) == 2
    assert "tiny.json" in capsys.readouterr().err


def test_too_few_repeats(repeats, tmp_path):
    with pytest.raises(ConfigError, match="4 repeats of tiny: at least 5 are needed"):
        _record(repeats[:4], tmp_path)


def test_recordings_that_are_refused(repeats, tmp_path):
    with pytest.raises(ConfigError, match="what differed between its repeats"):
        _record(repeats, tmp_path, varied=" ")
    with pytest.raises(DataError, match=r"has no number 'lost'; there are \['loss of step 1'"):
        _record(repeats, tmp_path, keys=["lost"])
    _write(repeats[3], LOSSES | {2: math.nan})
    with pytest.raises(DataError, match=r"loss of step 2 is nan in .*run3\.jsonl"):
        _record(repeats, tmp_path)
    _write(repeats[3], {1: 7.5, 2: 7.25})
    with pytest.raises(DataError, match=r"do not hold the same numbers: \['loss of step 3'\]"):
        _record(repeats, tmp_path)
    assert not (tmp_path / "tiny.json").exists()


def test_recording_keeps_other_platforms(repeats, folder, monkeypatch):
    first = json.loads((folder / "tiny.json").read_text())["platforms"]
    monkeypatch.setattr(goldens.platform, "machine", lambda: "riscv64")
    _record(repeats, folder)
    both = json.loads((folder / "tiny.json").read_text())["platforms"]
    assert len(both) == 2
    assert first.items() <= both.items()


def test_numbers_of_an_object(tmp_path):
    """Whole numbers must be equal; a float that never moved may by its last bits; lists and objects are opened."""
    results = []
    for i in range(5):
        results.append(tmp_path / f"{i}.json")
        results[-1].write_text(json.dumps({"kept": [2, 3], "sqnr": {"median": 31.5, "name": "x"}, "parameters": 10, "ok": True}))
    goldens.record("tiny", results, keys=["kept", "sqnr", "parameters"], varied="nothing", folder=tmp_path)
    golden = goldens.read_golden("tiny", tmp_path)
    tolerances = {name: entry.tolerance for name, entry in golden.values.items()}
    assert tolerances == {"kept.0": 0, "kept.1": 0, "sqnr.median": pytest.approx(31.5e-5), "parameters": 0}
    results[0].write_text(json.dumps({"kept": [1, 3], "sqnr": {"median": 31.5001}, "parameters": 10}))
    assert [name for name, *_, holds in goldens.compare(golden, results[0]) if not holds] == ["kept.0"]


def test_the_goldens_of_this_project_are_whole():
    """Whatever their platform."""
    from pathlib import Path

    folder = Path(__file__).parents[3] / goldens.FOLDER
    found = {path.stem: json.loads(path.read_text())["platforms"] for path in folder.glob("*.json")}
    assert found.keys() == {"train", "ptq", "prune", "distill"}
    for platforms in found.values():
        for golden in platforms.values():
            assert golden["repeats"] >= goldens.LEAST_REPEATS
            assert golden["tolerance_origin"]
            assert "dirty" not in golden["commit"]
            assert all(entry["tolerance"] <= 0.002 * abs(entry["value"]) for entry in golden["values"].values())
