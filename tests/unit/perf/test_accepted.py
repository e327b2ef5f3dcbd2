import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf.accepted import Accepted, read_accepted, segment, unplaced
from nemo_opt.perf.history import by_series

SERIES = "step/TP1PP2/time"
GOOD = {"series": SERIES, "since": "20260101T030000Z", "reason": "checks for NaN", "author": "A. Person"}


def text(**changes):
    values = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return "[[accepted]]\n" + "".join(f'{name} = "{value}"\n' for name, value in values.items())


@pytest.fixture
def read(tmp_path):
    def parse(content):
        (place := tmp_path / "accepted.toml").write_text(content)
        return read_accepted(place)

    return parse


@pytest.fixture
def history(figure, run):
    return [run(number, figure(1.0)) for number in range(6)]


def numbers(points):
    return [int(point.record.run_id, 16) for point in points]


def test_entries_are_read_in_order(read):
    assert read(text() + text(series="*")) == (Accepted(**GOOD), Accepted(**GOOD | {"series": "*"}))


def test_no_file_and_an_empty_one_accept_nothing(tmp_path, read):
    assert read_accepted(tmp_path / "nowhere.toml") == ()
    assert read("") == ()


@pytest.mark.parametrize("name", list(GOOD))
def test_entry_that_lacks_something_is_refused(read, name):
    with pytest.raises(DataError, match=f"entry 2: missing: {name}; unknown: nothing"):
        read(text() + text(**{name: None}))


@pytest.mark.parametrize("name", list(GOOD))
@pytest.mark.parametrize("value", ["", "  "])
def test_empty_text_is_refused(read, name, value):
    with pytest.raises(DataError, match=f"entry 1: {name} = "):
        read(text(**{name: value}))


def test_unknown_key_is_refused(read):
    with pytest.raises(DataError, match="unknown: until"):
        read(text(until="2027"))


@pytest.mark.parametrize("since", ["abc", "yesterday", "ABCDEF0", "2026-01-01T03:00:00Z", "f" * 41])
def test_since_that_is_neither_commit_nor_start_is_refused(read, since):
    with pytest.raises(DataError, match="since = "):
        read(text(since=since))


@pytest.mark.parametrize(
    "content",
    [
        "[[accepted]\n",
        "[accepted]\na = 1\n",
        "accepted = 3\n",
        "[[excepted]]\n",
        "accepted = [1]\n",
        text().replace('"20260101T030000Z"', "2026-01-01"),
    ],
)
def test_other_content_is_refused_by_file(read, content):
    with pytest.raises(DataError, match=r"accepted\.toml"):
        read(content)


@pytest.mark.parametrize("pattern", [SERIES, "step/*", "*/time", "step/TP?PP2/time"])
def test_entry_covers_its_series(pattern):
    assert Accepted(**GOOD | {"series": pattern}).covers(SERIES)


@pytest.mark.parametrize("pattern", ["step", "step/TP1PP2/tim", "STEP/*", "step/TP[12]PP2/time"])
def test_entry_covers_no_other(pattern):
    assert not Accepted(**GOOD | {"series": pattern}).covers(SERIES)


def test_brackets_are_only_brackets():
    series = "loss/[512, 4, 32000]/time"
    assert Accepted(**GOOD | {"series": series}).covers(series)
    assert Accepted(**GOOD | {"series": "loss/[512, 4, *]/time"}).covers(series)


@pytest.mark.parametrize("since", ["20260101T030000Z", "abc0003", "abc0003" + "0" * 33, "20260101T023000Z"])
def test_entry_begins_a_segment(history, since):
    points = by_series(history)[SERIES]
    entry = Accepted(**GOOD | {"since": since})
    assert numbers(segment(SERIES, points, [entry], history)) == [3, 4, 5]
    assert len(segment("another", points, [entry], history)) == 6


def test_newest_entry_counts(history):
    entries = [Accepted(**GOOD | {"since": since}) for since in ("abc0004", "abc0001")]
    assert numbers(segment(SERIES, by_series(history)[SERIES], entries, history)) == [4, 5]


def test_commit_that_was_never_measured_has_no_effect_and_is_told(history):
    entry = Accepted(**GOOD | {"since": "fffffff"})
    assert len(segment(SERIES, by_series(history)[SERIES], [entry], history)) == 6
    assert unplaced([entry, Accepted(**GOOD)], history) == [entry]


def test_commit_whose_run_lacks_the_series_begins_it_all_the_same(history, run, figure):
    other = [*history[:3], run(3, figure(1.0, "memory")), *history[4:]]
    entry = Accepted(**GOOD | {"since": "abc0003"})
    assert numbers(segment(SERIES, by_series(other)[SERIES], [entry], other)) == [4, 5]
