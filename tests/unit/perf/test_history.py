import random

import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf.history import by_series, environment_changes, in_order, read_history, step
from nemo_opt.perf.record import write


@pytest.fixture
def folder(tmp_path, figure, run):
    for number in (2, 0, 1):
        write(run(number, figure(float(number + 1))), tmp_path)
    return tmp_path / "here"


def test_records_come_in_order_of_time(folder):
    assert [record.run_id for record in read_history(folder)] == ["00000000", "00000001", "00000002"]


def test_order_does_not_depend_on_the_order_given(figure, run):
    runs = [run(number, figure(1.0)) for number in range(30)]
    shuffled = random.Random(0).sample(runs, len(runs))
    assert list(in_order(shuffled)) == runs


def test_every_file_that_cannot_be_read_is_named(folder):
    (folder / "20260101T000000Z-a.json").write_text("{")
    (folder / "20260102T000000Z-b.json").write_text('{"schema": 7}')
    with pytest.raises(DataError, match="2 of 5") as caught:
        read_history(folder)
    assert "Z-a.json" in str(caught.value)
    assert "Z-b.json" in str(caught.value)


def test_part_of_a_record_being_written_is_not_read(folder):
    (folder / "20260101T000000Z-a.123.part").write_text("{")
    assert len(read_history(folder)) == 3


def test_missing_folder_is_refused_and_an_empty_one_is_empty(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_history(tmp_path / "nowhere")
    assert read_history(tmp_path) == ()


def test_records_of_two_platforms_are_refused(folder, figure, run):
    other = write(run(9, figure(1.0), platform="there"), folder.parent)
    other.rename(folder / other.name)
    with pytest.raises(DataError, match="here, there"):
        read_history(folder)


def test_series_has_the_points_of_the_runs_that_measured_it(figure, run):
    runs = [run(0, figure(1.0)), run(1, figure(2.0), figure(5.0, "memory")), run(2, figure(3.0))]
    points = by_series(runs)
    assert [point.value for point in points["step/TP1PP2/time"]] == [1.0, 2.0, 3.0]
    assert [point.record for point in points["step/TP1PP2/memory"]] == [runs[1]]


def test_step_tells_what_else_changed(run):
    before = run(0, environment={"torch": "2.12", "driver": "", "kernel": "6.1", "gone": "1"})
    after = run(1, environment={"torch": "2.13", "driver": "580", "kernel": "6.1", "new": "1"})
    between = step(before, after)
    assert between.environment == {"torch": ("2.12", "2.13"), "driver": ("", "580")}
    assert "abc0000..abc0001" in str(between)
    assert "driver absent -> 580, torch 2.12 -> 2.13" in str(between)
    assert "same step" not in str(step(before, before))


def test_environment_changes_at_the_first_run_of_the_new_one(run):
    runs = [run(number, environment={"torch": version}) for number, version in enumerate(("1", "1", "2", "2", "1"))]
    assert environment_changes(runs) == {2, 4}
    assert environment_changes(runs[:1]) == frozenset()
    assert environment_changes([]) == frozenset()
