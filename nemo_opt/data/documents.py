"""Whole documents of the training share, as calibration reads them: each by itself, in an order that every rank finds alike.

Megatron's samples run across the ends of documents; calibration wants to know where those are. The order is drawn from the configuration's
seed, so that a few hundred rows come from all of the text and not from its beginning; sources of a blend take turns by their weights.
"""

from collections.abc import Iterator, Sequence

import nemo_opt._stack

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_opt.data.config import DataConfig, parse_split
from nemo_opt.data.datasets import indexed_sources
from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.errors import ConfigError

__all__ = ["training_documents"]


def training_documents(config: DataConfig, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Token ids of the training documents in random order, each once; collective.

    Raises:
        ConfigError: mock data, which has no documents.
        DataError: a source is missing, empty, truncated or too small, or was tokenised with a larger vocabulary.

    """
    if config.mock:
        raise ConfigError("mock data has no documents: give data paths")
    sources, weights = indexed_sources(config, tokenizer)
    share, *_ = parse_split(config.split)
    rng = np.random.default_rng(config.seed)
    return _blended([_shuffled(IndexedDataset(str(source.path)), share, rng) for source in sources], weights, rng)


def _shuffled(dataset: IndexedDataset, share: float, rng: np.random.Generator) -> Iterator[Sequence[int]]:
    order = rng.permutation(round(share * len(dataset)))  # as Megatron's builder rounds
    return (dataset.get(int(place)).tolist() for place in order)


def _blended(streams: list[Iterator[Sequence[int]]], weights: list[float], rng: np.random.Generator) -> Iterator[Sequence[int]]:
    """One document at a time from a stream drawn by weight, until all are empty."""
    left = dict(enumerate(zip(streams, weights, strict=True)))
    while left:
        keys = list(left)
        shares = np.array([left[key][1] for key in keys])
        key = keys[int(rng.choice(len(keys), p=shares / shares.sum()))]
        document = next(left[key][0], None)
        if document is None:
            del left[key]
        else:
            yield document
