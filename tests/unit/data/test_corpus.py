import json
import subprocess
import sys

import pytest

from nemo_opt.data.corpus import builtin_documents, corpus_fingerprint, read_documents
from nemo_opt.errors import DataError


def _paragraphs(texts):
    return [" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]


def test_builtin_corpus_holds_every_paragraph_once():
    from pydoc_data.topics import topics

    documents = builtin_documents()
    paragraphs = _paragraphs(documents)
    assert set(paragraphs) == set(_paragraphs(topics.values()))
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(documents) > 150
    assert sum(map(len, documents)) > 300_000  # 394,248 characters in Python 3.12


def test_any_split_is_representative():
    """The last documents are no special topic: their mean length is that of the rest within a factor of two."""
    lengths = [len(document) for document in builtin_documents()]
    mean = sum(lengths) / len(lengths)
    for share in (slice(0, 40), slice(-40, None)):
        assert mean / 2 < sum(lengths[share]) / 40 < mean * 2


def test_fingerprint_is_the_same_in_another_process_and_tells_documents_apart():
    code = "from nemo_opt.data.corpus import corpus_fingerprint; print(corpus_fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    assert other == corpus_fingerprint()
    assert corpus_fingerprint(["ab", "c"]) != corpus_fingerprint(["a", "bc"])


def test_missing_pydoc_data_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="pydoc_data"):
        builtin_documents()


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    texts = ["one", "two\n\nparts", "grün"]
    file.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    assert list(read_documents(file)) == texts


def test_txt_is_cut_at_blank_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\none\nmore\n \n\ntwo\n")
    assert list(read_documents(file)) == ["one\nmore", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', r"a\.jsonl:2: expected an object"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"content": "x"}', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": " "}\n', "no document with text"),
        ("a.txt", b"\n  \n\n", "no document with text"),
        ("a.parquet", b"x", "is not text"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(file))


def test_missing_and_empty_files_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "a.txt")
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match="is empty"):
        read_documents(tmp_path / "b.txt")
