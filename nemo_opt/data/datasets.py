"""Training and validation datasets: Megatron's GPTDataset over the sources of a `DataConfig`.

Decisions, each against a way in which Megatron's builder fails without a clear error:
- A split that rounds to no document makes Megatron count epochs for ever; it is refused first. So is one with too few tokens for a sample.
- Megatron's index cache is keyed by paths, not by contents: a rebuilt .bin would be read through the old indices. Here the directory of the
  cache carries sizes and modification times, and appears by one rename when it is whole.
- Bare prefixes are weighed by their tokens, so that a blend gives as many samples as asked (Megatron stops it after one epoch).
Every function here is collective: called on every rank, built on global rank 0 first.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_opt._stack

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig, parse_split
from nemo_opt.data.corpus import read_documents
from nemo_opt.data.indexed import build_indexed
from nemo_opt.data.sources import DataSource, read_index_header
from nemo_opt.data.tokenizer import Tokenizer
from nemo_opt.errors import ConfigError, DataError

__all__ = ["Dataset", "build_datasets", "indexed_sources"]

type Dataset = torch.utils.data.Dataset[dict[str, torch.Tensor]]
"""One sample has tokens, labels, loss_mask and position_ids of shape [S]."""


def build_datasets(config: DataConfig, tokenizer: Tokenizer, train_samples: int, valid_samples: int = 0) -> tuple[Dataset, Dataset | None]:
    """Datasets of at least `train_samples` and `valid_samples` samples; the second is None when none are asked for.

    Raises:
        ConfigError: a number of samples is out of range, or validation is asked for where the split has none.
        DataError: a source is missing, empty, truncated or too small, or was tokenised with a larger vocabulary.
    """
    _check_samples(config, train_samples, valid_samples)
    if config.mock:
        return _build(MockGPTDataset, _megatron_config(config, tokenizer, None, None), train_samples, valid_samples)
    sources = _checked_sources(config, tokenizer, valid_samples)
    blend = _blend(sources)
    final = config.cache_dir / "indices" / _fingerprint(config, tokenizer, sources, train_samples, valid_samples)
    cache = on_first(lambda: final if final.is_dir() else _directory_beside(final))
    datasets = _build(GPTDataset, _megatron_config(config, tokenizer, blend, cache), train_samples, valid_samples)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other ranks open the files that rank 0 built; only then may their directory be renamed
    on_first(lambda: _publish(cache, final))
    return datasets


def indexed_sources(config: DataConfig, tokenizer: Tokenizer) -> tuple[list[DataSource], list[float]]:
    """The .bin/.idx pairs of a configuration, text tokenised into the cache, and their weights; collective.

    Raises:
        DataError: as `build_datasets`.
    """
    sources = _checked_sources(config, tokenizer, 0)
    return sources, _blend(sources)[1] or [1.0]


def _checked_sources(config: DataConfig, tokenizer: Tokenizer, valid_samples: int) -> list[DataSource]:
    on_first(config.check)
    sources = [_indexed(source, tokenizer, config) for source in config.sources]
    on_first(lambda: _check_contents(sources, config, tokenizer, valid_samples))
    return sources


def _check_samples(config: DataConfig, train_samples: int, valid_samples: int) -> None:
    if train_samples < 1 or valid_samples < 0:
        raise ConfigError(f"train_samples {train_samples} must be positive and valid_samples {valid_samples} not negative")
    if valid_samples and not config.mock and not parse_split(config.split)[1]:
        raise ConfigError(f"{valid_samples} validation samples asked for, but split {config.split!r} has no validation share")


def _indexed(source: DataSource, tokenizer: Tokenizer, config: DataConfig) -> DataSource:
    """The source itself, or the cached .bin/.idx of its text."""
    if source.kind == "indexed":
        return source
    prefix = on_first(lambda: _tokenise(source.path, tokenizer, config.cache_dir / "tokens"))
    return DataSource(path=prefix, kind="indexed", weight=source.weight)


def _tokenise(path: Path, tokenizer: Tokenizer, directory: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{path.suffix} {tokenizer.fingerprint} {tokenizer.eod}".encode())
    prefix = directory / f"{path.stem}-{digest.hexdigest()[:20]}"
    if not Path(f"{prefix}.idx").is_file():
        build_indexed(read_documents(path), tokenizer, prefix)
    return prefix


def _check_contents(sources: Sequence[DataSource], config: DataConfig, tokenizer: Tokenizer, valid_samples: int) -> None:
    train, valid, _ = parse_split(config.split)
    for source in sources:
        dataset = IndexedDataset(str(source.path))
        lengths = dataset.sequence_lengths
        _check_share(source, "training", lengths, (0.0, train), config.seq_length)
        if valid_samples:
            _check_share(source, "validation", lengths, (train, train + valid), config.seq_length)
        _check_tokens(source, dataset, tokenizer)


def _check_share(source: DataSource, name: str, lengths: Any, bounds: tuple[float, float], seq_length: int) -> None:
    first, last = (round(bound * len(lengths)) for bound in bounds)  # as Megatron's builder rounds
    tokens = int(lengths[first:last].sum())
    if tokens < seq_length + 1:
        raise DataError(
            f"{source.path}: its {name} share has {tokens} tokens in {last - first} of {len(lengths)} documents, one sample needs "
            f"seq_length + 1 = {seq_length + 1}; give more text or documents, another split, or a shorter seq_length"
        )


def _check_tokens(source: DataSource, dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """A sample of documents decides whether the dataset can belong to this tokenizer."""
    places = np.linspace(0, len(dataset) - 1, num=min(len(dataset), 100), dtype=int)
    largest = max(int(dataset.get(int(place)).max(initial=0)) for place in places)
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{source.path} holds token {largest}, but the tokenizer at {tokenizer.path} has {tokenizer.vocab_size} tokens; "
            "give the tokenizer that the dataset was made with"
        )


def _blend(sources: Sequence[DataSource]) -> tuple[list[str], list[float] | None]:
    prefixes = [str(source.path) for source in sources]
    if len(sources) == 1:
        return prefixes, None
    return prefixes, [source.weight or float(read_index_header(source.path).num_tokens) for source in sources]


def _megatron_config(
    config: DataConfig, tokenizer: Tokenizer, blend: tuple[list[str], list[float] | None] | None, cache: Path | None
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=blend,
        split=config.split if blend else None,
        path_to_cache=str(cache) if cache else None,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _build(cls: type[GPTDataset], config: GPTDatasetConfig, train_samples: int, valid_samples: int) -> tuple[Dataset, Dataset | None]:
    unused = (1, 2) if not valid_samples else (2,)
    for split in unused:
        config.split_matrix[split] = None  # or Megatron would build it too, and hang where it is empty
    builder = BlendedMegatronDatasetBuilder(cls, [train_samples, valid_samples, 0], lambda: True, config)
    train, valid, _ = builder.build()
    return train, valid


def _fingerprint(config: DataConfig, tokenizer: Tokenizer, sources: Sequence[DataSource], *samples: int) -> str:
    files = [Path(f"{source.path}{suffix}") for source in sources for suffix in (".bin", ".idx")]
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    weights = [source.weight for source in sources]
    key = [states, weights, samples, config.seed, config.seq_length, config.split, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


def _directory_beside(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}.", dir=final.parent))


def _publish(cache: Path, final: Path) -> None:
    """Renames the finished cache; its files are mapped already, so the datasets do not notice."""
    if cache == final:
        return
    try:
        cache.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(cache)  # another run was first and wrote the same; open maps stay valid
