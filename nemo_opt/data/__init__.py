"""Text to batches: corpus, tokenizer, Megatron's indexed datasets, and the batches that training and calibration read.

The function `batches` is imported from its module of the same name.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.data.batches import cp_slice
    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.data.config import DataConfig
    from nemo_opt.data.corpus import builtin_documents, corpus_fingerprint, read_documents
    from nemo_opt.data.datasets import build_datasets
    from nemo_opt.data.indexed import build_indexed
    from nemo_opt.data.sources import DataSource, parse_data_paths
    from nemo_opt.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_EXPORTS = {
    "batches": ["cp_slice"],
    "calibration": ["calibration_batches"],
    "config": ["DataConfig"],
    "corpus": ["builtin_documents", "corpus_fingerprint", "read_documents"],
    "datasets": ["build_datasets"],
    "indexed": ["build_indexed"],
    "sources": ["DataSource", "parse_data_paths"],
    "tokenizer": ["Tokenizer", "load_tokenizer", "train_tokenizer"],
}

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs=_EXPORTS)

__all__ = [
    "DataConfig",
    "DataSource",
    "Tokenizer",
    "build_datasets",
    "build_indexed",
    "builtin_documents",
    "calibration_batches",
    "corpus_fingerprint",
    "cp_slice",
    "load_tokenizer",
    "parse_data_paths",
    "read_documents",
    "train_tokenizer",
]
