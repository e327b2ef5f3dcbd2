"""Megatron's .bin/.idx datasets, written from documents.

Decisions:
- One document is one sequence ending in the tokenizer's end-of-document token, as Megatron's own preprocessing writes it.
- Both files are written beside and renamed; the .idx comes last, so that a pair whose .idx exists is whole.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import batched
from pathlib import Path

import nemo_opt._stack

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.errors import DataError

__all__ = ["build_indexed"]

_DOCUMENTS_AT_ONCE = 1000  # tokenised in parallel; bounds the memory


def build_indexed(documents: Iterable[str], tokenizer: Tokenizer, prefix: str | Path) -> Path:
    """Writes PREFIX.bin and PREFIX.idx, replacing an older pair, and returns the prefix.

    Raises:
        DataError: no document holds text. Nothing is written then.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    beside = {suffix: prefix.with_name(f".{prefix.name}.{os.getpid()}{suffix}") for suffix in (".bin", ".idx")}
    try:
        builder = IndexedDatasetBuilder(str(beside[".bin"]), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        count = 0
        for ids in _tokenised(documents, tokenizer):
            builder.add_document(np.array(ids), [len(ids)])
            count += 1
        builder.finalize(str(beside[".idx"]))
        if not count:
            raise DataError(f"no document with text to write to {prefix}; check the source")
        for suffix, file in beside.items():
            file.replace(f"{prefix}{suffix}")
    finally:
        for file in beside.values():
            file.unlink(missing_ok=True)
    return prefix


def _tokenised(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for texts in batched((document for document in documents if document.strip()), _DOCUMENTS_AT_ONCE):
        for ids in tokenizer.encode_batch(list(texts)):
            yield [*ids, tokenizer.eod]
