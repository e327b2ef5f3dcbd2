"""Comparisons on file: what was appended comes back, and what is none is refused with its line."""

import json

import numpy as np
import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf.pair_file import append_pairs, read_pairs


@pytest.fixture
def comparison(figure, run):
    """Base and head of some pairs: a measurement by two clocks, and a count."""

    def make(number, pairs=2):
        return [
            [
                run(
                    number + i,
                    figure(1.234567 + i + side, "time", kind="time"),
                    figure(2.0 + i + side, "processor time", kind="time"),
                    figure(7, "count", kind="exact"),
                )
                for i in range(pairs)
            ]
            for side in (0, 10)
        ]

    return make


def test_comparisons_come_back_in_order(comparison, figure, tmp_path):
    place = tmp_path / "new" / "pairs.jsonl"
    append_pairs(place, *comparison(0))
    append_pairs(place, *comparison(5, pairs=1))
    ((name, values),) = read_pairs(place).items()
    assert name == figure(1.0).series.rpartition("/")[0]
    assert values.shape == (3, 2, 2)
    assert values[:, 0].tolist() == [[1.2346, 2.0], [2.2346, 3.0], [1.2346, 2.0]], "of the base, by clock, five digits"
    assert np.array_equal(values[:, 1, 1], values[:, 0, 1] + 10)


def test_a_line_says_of_which_sources_it_is(comparison, tmp_path):
    base, head = comparison(0)
    append_pairs(tmp_path / "pairs.jsonl", base, head)
    line = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert (line["platform"], line["base_commit"], line["started"]) == (base[0].platform, base[0].commit, base[0].started)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-5], r"pairs.jsonl:2: not a comparison: JSONDecodeError"),
        (lambda line: line.replace('"schema": 1', '"schema": 2'), "schema 2 != 1"),
        (lambda line: line.replace('"base": [', '"base": [[1.0, 2.0], '), "ValueError"),
        (lambda line: line.replace("1.2346", "-1.0"), "positive numbers"),
        (lambda line: line.replace('"head"', '"tail"'), "KeyError"),
        (lambda line: "[]", "TypeError"),
        (lambda line: line.replace('"platform": "', '"platform": "another '), "comparisons of several platforms, another"),
    ],
)
def test_what_is_no_comparison_is_refused(comparison, tmp_path, change, message):
    place = tmp_path / "pairs.jsonl"
    append_pairs(place, *comparison(0))
    place.write_text(place.read_text() + change(place.read_text().rstrip()) + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(place)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing.jsonl cannot be read"):
        read_pairs(tmp_path / "nothing.jsonl")
