"""Documents: the English text that ships with Python, and the user's own files.

Decisions:
- The built-in corpus is `pydoc_data.topics` (half a megabyte of reference prose in every Python): training on it needs no download.
  It differs between Python releases, so `corpus_fingerprint` belongs into every cache key and golden number.
- Topics are between 200 and 60,000 characters long, too uneven for a split by documents; they are cut at blank lines into documents of
  about 2,000 characters and put into an order given by their hashes, so that any split is representative.
- A fifth of the text stands in several topics; such a paragraph is kept once, or validation would measure what training has seen.
- A .txt holds documents separated by blank lines; documents with blank lines inside belong into a .jsonl, one `{"text": ...}` a line.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_opt.data.sources import TEXT_SUFFIXES
from nemo_opt.errors import DataError

__all__ = ["builtin_documents", "corpus_fingerprint", "read_documents"]

_DOCUMENT_CHARS = 2000


def builtin_documents() -> list[str]:
    """The built-in corpus, about 200 documents of real English; the same in every process of one Python release.

    Raises:
        DataError: this Python was installed without `pydoc_data`.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise DataError("this Python lacks pydoc_data.topics, the built-in corpus; give a .txt or .jsonl file instead") from None
    seen: set[str] = set()
    documents = [document for name in sorted(topics) for document in _cut(_new_paragraphs(topics[name], seen))]
    return sorted(documents, key=_digest)


def corpus_fingerprint(documents: list[str] | None = None) -> str:
    """SHA-256 of the documents (the built-in ones when None) in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for document in builtin_documents() if documents is None else documents:
        digest.update(_digest(document))
    return digest.hexdigest()


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a .jsonl (key "text") or .txt file (separated by blank lines), read as they are consumed.

    Raises:
        DataError: at once when the file is missing, empty or of another kind; on reaching it, for a malformed line (with its number),
            and at the end when no document held any text.
    """
    path = Path(path)
    if path.suffix not in TEXT_SUFFIXES:
        raise DataError(f"{path} is not text; expected a file ending in {' or '.join(TEXT_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    return _non_empty(path, _jsonl(path) if path.suffix == ".jsonl" else _paragraphs(path))


def _digest(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs that are not in `seen`, which grows."""
    for paragraph in text.strip("\n").split("\n\n"):
        if (words := " ".join(paragraph.split())) and words not in seen:
            seen.add(words)
            yield paragraph


def _cut(paragraphs: Iterable[str]) -> Iterator[str]:
    """Documents of at least `_DOCUMENT_CHARS` characters (the last may be shorter)."""
    piece: list[str] = []
    size = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size >= _DOCUMENT_CHARS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _non_empty(path: Path, documents: Iterator[str]) -> Iterator[str]:
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"{path} holds no document with text")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f'{path}:{number}: expected an object with a string under "text", got {line.strip()[:80]}')
        yield record["text"]


def _paragraphs(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\r\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\r\n")
