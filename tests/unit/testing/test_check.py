"""The language of checks: what holds, what fails, and above all what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.testing.assertions import read
from nemo_opt.testing.check import evaluate, main

NAMES = {
    "loss_before": 5.0,
    "loss_after": 5.02,
    "model": {"hidden": 64, "name": "tiny"},
    "layout": "TP2PP1",
    "none": None,
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    "expression",
    [
        "loss_after < loss_before + 0.05",
        "abs(loss_after - loss_before) <= 0.02001",
        "model.hidden == 8 * 8 and model.name == 'tiny'",
        "layout in ['TP2PP1', 'TP1PP2']",
        "none is None",
        "loss_after is not None",
        "not (1 > 2)",
        "4 < loss_before < 6",
        "max(1, 2, 3) == 3",
        "-loss_before == -5",
        "1 > 2 or 2 > 1",
    ],
)
def test_true(expression):
    assert evaluate(expression, NAMES) is True


@pytest.mark.parametrize("expression", ["loss_after < loss_before", "4 < loss_before < 5", "layout == 'TP1PP2'", "1 > 2 and 1 / 0 > 0"])
def test_false(expression):
    assert evaluate(expression, NAMES) is False


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "loss_before.__class__",
        "(lambda: 1)() == 1",
        "[x for x in [1]] == [1]",
        "model['hidden'] == 64",
        "open('x')",
        "f'{loss_before}' == ''",
        "loss_before ** 99 > 0",
        "max(1, key=2)",
        "missing < 1",
        "model.missing < 1",
        "loss_before.real == 5",
        "loss_before <",
        "loss_before = 5",
        "nan < 1",
        "not nan < 1",
        "loss_before < 'a'",
        "loss_before / 0 > 1",
        "b'x' == 1",
        "loss_before not in [1]",
    ],
)
def test_refused(expression):
    with pytest.raises(ConfigError):
        evaluate(expression, NAMES)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_comparisons_are_pythons(a, b):
    for symbol, expected in (("<", a < b), ("<=", a <= b), ("==", a == b), ("!=", a != b), (">", a > b), (">=", a >= b)):
        assert evaluate(f"a {symbol} b", {"a": a, "b": b}) is expected


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"loss": 5.0, "model": {"hidden": 64}}))
    return path


def test_command(result, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"loss": 4.0}))
    assert main([str(result), "loss == 5", "--with", f"other={other}", "loss > other.loss"]) == 0
    assert main([str(result), "--with", f"other={other}", "other.loss < loss"]) == 0
    assert "other.loss = 4.0, loss = 5.0" in capsys.readouterr().out


def test_one_failure_fails_the_command_and_shows_values(result, capsys):
    assert main([str(result), "loss == 5", "loss < 4"]) == 1
    assert "FAIL loss < 4   (loss = 5.0)" in capsys.readouterr().out


def test_a_number_is_not_a_verdict(result):
    assert main([str(result), "loss"]) == 1


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_bad_files(tmp_path, content, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main([str(path), "1 == 1"]) == 2
    assert main([str(tmp_path / "missing.json"), "1 == 1"]) == 2
    assert "error" in capsys.readouterr().err


JUNIT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><properties/></testcase><testcase name="c"><failure/></testcase>
<testcase name="d"><error/></testcase><testcase name="e"><skipped/></testcase></testsuite></testsuites>"""


def test_tests_of_a_junit_file_are_counted(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    assert main([str(path), "tests == 5", "passed == 2", "failed == 1", "errors == 1", "skipped == 1"]) == 0
    assert main([str(path), "failed + errors + skipped == 0"]) == 1
    path.write_text(JUNIT[:-20])
    assert main([str(path), "passed == 2"]) == 2


class TestRecord:
    """What the suite's runner learns."""

    @pytest.fixture
    def recorded(self, tmp_path, monkeypatch):
        place = tmp_path / "assertions.jsonl"
        monkeypatch.setenv("NEMO_OPT_ASSERTIONS", str(place))
        return lambda: [(a.what, a.holds, a.values) for a in read(place)]

    def test_each_verdict_with_its_numbers(self, result, recorded):
        assert main([str(result), "loss == 5", "model.hidden < 10"]) == 1
        assert recorded() == [("loss == 5", True, {"loss": 5.0}), ("model.hidden < 10", False, {"model.hidden": 64})]

    def test_what_cannot_be_judged_does_not_hold(self, result, recorded, tmp_path):
        assert main([str(result), "loss == 5", "missing == 1", "loss > 0"]) == 2
        assert main([str(tmp_path / "missing.json"), "loss == 5"]) == 2
        (_, good, _), (first, missing, values), (second, unread, _) = recorded()
        assert (good, missing, unread) == (True, False, False)
        assert (first, second) == ("missing == 1", "the results can be read")
        assert "has no entry 'missing'" in values["error"]
