"""metrics.jsonl of runs that are killed and go on."""

import nemo_opt._stack

import pytest

from nemo_opt.training import metrics_log
from nemo_opt.training.metrics_log import MetricsLog, read_metrics

KILLED = (
    '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 2, "validation_loss": 4.5}\n{"step": 3, "loss": NaN}\n{"step": 4, "lo'
)


@pytest.fixture
def rank(monkeypatch):
    def become(number):
        monkeypatch.setattr(metrics_log.dist, "get_rank", lambda: number)

    become(0)
    return become


def test_a_line_that_was_cut_short_is_no_line(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(KILLED)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2, 3]


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (1, 1), (2, 3)])
def test_a_run_that_goes_on_drops_what_it_will_write_again(rank, tmp_path, after, kept):
    (tmp_path / "metrics.jsonl").write_text(KILLED)
    log = MetricsLog(tmp_path, after=after)
    log.write(step=after + 1, loss=3.0)
    assert len(read_metrics(tmp_path)) == kept + 1, "a line is on the disk as soon as it is written"
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*KILLED.splitlines()[:kept], f'{{"step": {after + 1}, "loss": 3.0}}']
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("number", "directory"), [(1, "there"), (0, None)])
def test_other_ranks_and_runs_without_a_directory_write_nothing(rank, tmp_path, number, directory):
    rank(number)
    log = MetricsLog(directory and tmp_path / directory)
    log.write(step=1)
    log.close()
    assert not list(tmp_path.iterdir())


def test_the_directory_is_made(rank, tmp_path):
    MetricsLog(tmp_path / "a" / "b").close()
    assert read_metrics(tmp_path / "a" / "b") == []
