import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.data.sources import DataSource, check_source, parse_data_paths, read_index_header
from nemo_opt.errors import ConfigError, DataError


def write_pair(prefix, lengths, *, code=8, item_bytes=2):
    """A .bin/.idx pair in Megatron's format, written independently of Megatron."""
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    idx += struct.pack(f"<{len(lengths)}i", *lengths)
    idx += struct.pack(f"<{len(lengths)}q", *(item_bytes * sum(lengths[:i]) for i in range(len(lengths))))
    idx += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(bytes(item_bytes * sum(lengths)))


def test_bare_paths():
    assert parse_data_paths(["a/b", "c.txt", "d.jsonl"]) == [
        DataSource(path=Path("a/b"), kind="indexed"),
        DataSource(path=Path("c.txt"), kind="text"),
        DataSource(path=Path("d.jsonl"), kind="text"),
    ]


def test_weighted_paths():
    assert parse_data_paths(["1.0", "a", "30", "b.txt"]) == [
        DataSource(path=Path("a"), kind="indexed", weight=1.0),
        DataSource(path=Path("b.txt"), kind="text", weight=30.0),
    ]


@given(st.lists(st.tuples(st.floats(0.01, 100), st.from_regex(r"[a-d]{1,5}/x", fullmatch=True)), min_size=1))
def test_weights_and_paths_stay_together(pairs):
    sources = parse_data_paths([part for weight, path in pairs for part in (str(weight), path)])
    assert [(source.weight, str(source.path)) for source in sources] == pairs


@pytest.mark.parametrize("paths", [[], ["1.0"], ["1.0", "a", "b"], ["a", "1.0"], ["0", "a"], ["-1", "a"], ["1", "2"], ["a", ""]])
def test_bad_blends_are_refused(paths):
    with pytest.raises(ConfigError):
        parse_data_paths(paths)


def test_header(tmp_path):
    write_pair(tmp_path / "d", [3, 4, 5])
    header = read_index_header(tmp_path / "d")
    assert (header.item_bytes, header.num_sequences, header.num_tokens) == (2, 3, 12)
    check_source(DataSource(path=tmp_path / "d", kind="indexed"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_of_a_pair_is_named(tmp_path, suffix):
    write_pair(tmp_path / "d", [3])
    (tmp_path / f"d{suffix}").unlink()
    with pytest.raises(DataError, match=f"missing: d{suffix}"):
        read_index_header(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_file_is_named(tmp_path, suffix):
    write_pair(tmp_path / "d", [30, 20])
    file = tmp_path / f"d{suffix}"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"d{suffix} is truncated"):
        read_index_header(tmp_path / "d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a Megatron index"),
        (b"x" * 50, "not a Megatron index"),
        (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 1, 2), "version 2"),
    ],
)
def test_foreign_index_is_refused(tmp_path, content, message):
    (tmp_path / "d.idx").write_bytes(content)
    (tmp_path / "d.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        read_index_header(tmp_path / "d")


def test_index_without_tokens_is_refused(tmp_path):
    write_pair(tmp_path / "d", [])
    with pytest.raises(DataError, match="no token"):
        read_index_header(tmp_path / "d")


def test_wrong_names_are_explained(tmp_path):
    write_pair(tmp_path / "d", [3])
    with pytest.raises(DataError, match="give the prefix"):
        read_index_header(tmp_path / "d.idx")
    (tmp_path / "e.json").touch()
    with pytest.raises(DataError, match=r"only \.jsonl, \.txt"):
        read_index_header(tmp_path / "e.json")


def test_text_files_are_checked(tmp_path):
    source = DataSource(path=tmp_path / "a.txt", kind="text")
    with pytest.raises(DataError, match="does not exist"):
        check_source(source)
    source.path.touch()
    with pytest.raises(DataError, match="is empty"):
        check_source(source)
    source.path.write_text("x")
    check_source(source)
