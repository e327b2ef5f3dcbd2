from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.data.config import DataConfig, cache_directory, parse_split
from nemo_opt.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("split", "shares"), [("99,1,0", (0.99, 0.01, 0)), ("1", (1, 0, 0)), ("3,1", (0.75, 0.25, 0)), ("0.5,0.25,0.25", (0.5, 0.25, 0.25))]
)
def test_split(split, shares):
    assert parse_split(split) == pytest.approx(shares)


@pytest.mark.parametrize("split", ["", "a,b", "0,1,0", "1,-1", "1,1,1,1", "nan,1", "inf,1"])
def test_bad_split_is_refused(split):
    with pytest.raises(ConfigError, match="split"):
        parse_split(split)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=3))
def test_shares_sum_to_one(shares):
    assert sum(parse_split(",".join(map(str, shares)))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": None}, "no data paths"),
        ({"paths": []}, "no data paths"),
        ({"mock": True}, "exclude each other"),
        ({"seq_length": 0}, "seq_length"),
        ({"micro_batch_size": True}, "micro_batch_size"),
        ({"global_batch_size": 3, "micro_batch_size": 2}, "3 % micro_batch_size 2"),
        ({"split": "x"}, "split"),
        ({"paths": ["1.0"]}, "1.0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**({"paths": ["prefix"], "seq_length": 8} | changes))


def test_mock_is_accepted_when_asked_for():
    config = DataConfig(mock=True, seq_length=8)
    assert config.sources == []
    config.check()


def test_check_meets_missing_data(tmp_path):
    with pytest.raises(DataError, match="gone"):
        DataConfig(paths=[str(tmp_path / "gone")], seq_length=8).check()


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig(mock=True, seq_length=8).cache_dir == tmp_path / "nemo_opt" / "data" == cache_directory()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "nemo_opt" / "data"
    assert DataConfig(mock=True, seq_length=8, index_mapping_dir=str(tmp_path / "x")).cache_dir == tmp_path / "x"
