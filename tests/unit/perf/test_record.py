import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.errors import DataError
from nemo_opt.perf import record as module
from nemo_opt.perf.record import Figure, Record, read, write

WORDS = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
FIGURES = st.builds(
    Figure,
    bench=WORDS,
    case=WORDS,
    metric=WORDS,
    value=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    unit=WORDS,
    kind=st.sampled_from(["exact", "ratio", "time", "memory"]),
    direction=st.sampled_from(["lower", "higher"]),
    samples=st.lists(NUMBERS, max_size=4).map(tuple),
    peer_value=st.none() | NUMBERS,
    goal=st.none() | NUMBERS,
)


@pytest.fixture
def written(tmp_path, figure, run):
    return write(run(1, figure(1.5), failed=("export",), environment={"torch": "2.13"}, load=(0.5, 1.5)), tmp_path)


@given(st.lists(FIGURES, max_size=3, unique_by=lambda figure: figure.series), st.dictionaries(WORDS, WORDS, max_size=3))
def test_record_is_read_as_it_was_written(tmp_path_factory, run, figures, environment):
    there = run(1, *figures, environment=environment, time_s=3.25, load=(0.1, 0.2), failed=("a", "b"))
    assert read(write(there, tmp_path_factory.mktemp("history"))) == there


def test_file_lies_in_its_platform_and_sorts_by_time(tmp_path, figure, run):
    places = [write(run(number, figure(1.0)), tmp_path) for number in (30, 2, 11)]
    assert [place.parent.name for place in places] == ["here"] * 3
    assert sorted(places) == [places[1], places[2], places[0]]


def test_nothing_but_the_record_is_left_beside_it(written):
    assert list(written.parent.iterdir()) == [written]


def test_record_is_never_overwritten(tmp_path, figure, run, written):
    before = written.read_bytes()
    with pytest.raises(DataError, match="exists"):
        write(run(1, figure(99.0)), tmp_path)
    assert written.read_bytes() == before


def test_two_runs_of_one_commit_and_second_have_two_files(tmp_path, figure):
    facts = {"started": "20260101T000000Z", "commit": "", "platform": "here", "figures": (figure(1.0),)}
    assert write(Record(**facts), tmp_path) != write(Record(**facts), tmp_path)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused(written, schema):
    written.write_text(json.dumps(json.loads(written.read_text()) | {"schema": schema}))
    with pytest.raises(DataError, match=rf"{written.name}: schema {schema} != 1"):
        read(written)


def test_every_truncated_file_is_refused_by_name(written):
    text = written.read_text()
    for length in range(0, len(text.rstrip()), 7):
        written.write_text(text[:length])
        with pytest.raises(DataError, match=written.name):
            read(written)


@pytest.mark.parametrize("name", ["figures", "platform", "started", "load", "failed"])
def test_file_that_lacks_a_field_is_refused(written, name):
    values = json.loads(written.read_text())
    del values[name]
    written.write_text(json.dumps(values))
    with pytest.raises(DataError, match=written.name):
        read(written)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"schema": 1, "figures": 3}', '{"schema": 1, "figures": [{}], "unknown": 1}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (place := tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json"):
        read(place)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.json"):
        read(tmp_path / "b.json")


def test_series_measured_twice_is_refused(figure, run):
    with pytest.raises(DataError, match="measured twice in one run: step/TP1PP2/time"):
        run(1, figure(1.0), figure(2.0), figure(2.0, "memory"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figure_that_is_no_number_is_refused(figure, value):
    with pytest.raises(DataError, match="step/TP1PP2/time"):
        figure(value)


@pytest.mark.parametrize("name", ["", " ", "a/b"])
@pytest.mark.parametrize("field", ["bench", "case", "metric"])
def test_name_without_words_or_with_a_slash_is_refused(figure, field, name):
    with pytest.raises(DataError, match="without a slash"):
        replace(figure(1.0), **{field: name})


@pytest.mark.parametrize(
    ("direction", "goal", "reached"), [("lower", 2.0, True), ("lower", 0.5, False), ("higher", 0.5, True), ("higher", 2.0, False)]
)
def test_goal_is_reached_in_its_direction(figure, direction, goal, reached):
    assert figure(1.0, direction=direction, goal=goal).reached is reached
    assert figure(goal, direction=direction, goal=goal).reached is True


def test_spread_is_of_three_rounds_at_least(figure):
    assert figure(1.0, samples=(1.0, 2.0)).spread is None
    assert figure(1.0, samples=(0.0, 0.0, 0.0)).spread is None
    assert figure(2.0, samples=(1.0, 2.0, 2.5, 9.0)).spread == pytest.approx(0.75 / 2.25)
    assert figure(2.0).reached is None


def test_schema_is_written(written):
    assert json.loads(written.read_text())["schema"] == module.SCHEMA


@pytest.mark.parametrize("kind", ["ratio", "time"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_times_are_positive(kind, value):
    with pytest.raises(DataError, match=f"a {kind} of {value} cannot be compared"):
        Figure(bench="b", case="c", metric="m", kind=kind, value=value)
    assert Figure(bench="b", case="c", metric="m", kind="exact", value=value).value == value
