"""The record of assertions: nothing without a file, plain values in it, damage that is noticed."""

import json

import pytest

from nemo_opt.errors import DataError
from nemo_opt.testing.assertions import VARIABLE, Assertion, key_numbers, main, read, record


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "a.jsonl"))
    return tmp_path / "a.jsonl"


def test_nothing_without_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    record("check", "x == 1", True)
    assert read(tmp_path / "a.jsonl") == []


def test_round_trip(place):
    values = {"loss": 4.5, "steps": 3, "name": "tiny", "none": None, "flag": True}
    record("check", "loss < 5", True, values, source="eval")
    record("golden", "losses", False)
    assert read(place) == [
        Assertion(kind="check", what="loss < 5", holds=True, values=values, source="eval"),
        Assertion(kind="golden", what="losses", holds=False),
    ]


def test_values_stay_small_and_are_json(place):
    record("check", "x", True, {"list": [1] * 500, "nan": float("nan"), "text": "a" * 900, "path": place})
    values = read(place)[0].values
    assert (values["list"], values["nan"], len(values["text"]), values["path"]) == ("500 entries", "nan", 200, str(place)[:200])
    json.loads(place.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "check"}', '{"kind": "a", "what": "b", "holds": true, "more": 1}', ""])
def test_damage_is_noticed(place, line):
    record("check", "x", True)
    with place.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="is damaged"):
        read(place)


def test_key_numbers():
    """Fractions before counts, a result's own first; the first of one name and of equal numbers."""

    def values(**numbers):
        return Assertion(kind="check", what="", holds=True, values=numbers)

    found = [values(steps=30, flag=True, loss=4.123456789, name="tiny"), values(same=4.123456, gap=1e-9, loss=9.0, layers=2)]
    found.append(values(**{"facts.loss": 7.5, "last": 0.25}))
    assert key_numbers(found, 9) == {"loss": "4.1235", "gap": "1e-09", "last": "0.25", "facts.loss": "7.5", "steps": "30", "layers": "2"}
    assert list(key_numbers(found, 2)) == ["loss", "gap"]
    assert key_numbers([]) == {}


def test_from_a_shell(place):
    assert main(["refused", 'is "wrong"\n', "true"]) == 0
    assert main(["refused", "other", "false"]) == 0
    assert [(a.kind, a.what, a.holds) for a in read(place)] == [("refused", 'is "wrong"\n', True), ("refused", "other", False)]
    with pytest.raises(KeyError):
        main(["refused", "other", "perhaps"])
