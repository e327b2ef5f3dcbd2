"""Data settings for commands: the user's files, mock data if asked for, else the built-in corpus. Loads no torch."""

import json
import os
from pathlib import Path
from typing import Any

from nemo_opt.data.config import DataConfig, cache_directory
from nemo_opt.data.corpus import builtin_documents, corpus_fingerprint

__all__ = ["builtin_corpus", "data_config"]

BUILTIN_SPLIT = "90,10,0"
"""The built-in corpus is small: 1 % of its 250 documents would be two, too few to validate on."""


def builtin_corpus() -> Path:
    """The built-in corpus as a .jsonl in the cache; made on first use, never left half written."""
    documents = builtin_documents()
    path = cache_directory() / f"builtin-{corpus_fingerprint(documents)[:16]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        beside.replace(path)
    return path


def data_config(paths: list[str] | None = None, *, mock: bool = False, split: str | None = None, **settings: Any) -> DataConfig:
    """`DataConfig` with the built-in corpus where neither paths nor mock data are asked for (split `BUILTIN_SPLIT` there)."""
    if paths or mock:
        return DataConfig(paths=paths or None, mock=mock, split=split or "99,1,0", **settings)
    return DataConfig(paths=[str(builtin_corpus())], split=split or BUILTIN_SPLIT, **settings)
