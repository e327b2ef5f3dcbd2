"""What every command does around its own work: the layout, the data, losses and sizes. All functions are collective."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.data.batches import batches
from nemo_opt.data.calibration import Packing, calibration_batches
from nemo_opt.data.config import DataConfig
from nemo_opt.data.datasets import Dataset, build_datasets
from nemo_opt.data.documents import training_documents
from nemo_opt.data.tokenizer import Tokenizer, load_tokenizer
from nemo_opt.device import choose_device
from nemo_opt.models.build import spec_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.shards import parameter_shards
from nemo_opt.parallel import Topology, parallel
from nemo_opt.training.evaluate import evaluate

__all__ = ["Feed", "Session", "count_parameters", "directory_bytes", "open_feed", "session", "world_size"]


def world_size() -> int:
    """Ranks of the job, known before the world is made."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(kw_only=True)
class Session:
    """One command at work."""

    topology: Topology
    """The resolved layout."""
    started: float = field(default_factory=time.perf_counter)
    """For `facts`."""

    def facts(self, chunks: list[Any]) -> dict[str, Any]:
        """The fields that every result has, except the path."""
        choice = choose_device()
        return {
            "layout": self.topology.name,
            "spec": spec_of(chunks[0]),
            "device": f"{choice.type}/{choice.backend}",
            "parameters": count_parameters(chunks),
            "time_s": time.perf_counter() - self.started,
        }


@contextmanager
def session(topology: Topology, model: ModelConfig | None = None, *, seed: int = 1234) -> Iterator[Session]:
    """Sets the layout up, and releases it."""
    started = time.perf_counter()
    with parallel(topology, seed=seed, model=model) as resolved:
        yield Session(topology=resolved, started=started)


@dataclass(kw_only=True)
class Feed:
    """Training and validation batches of this data parallel rank."""

    config: DataConfig
    """How samples are cut into batches."""
    tokenizer: Tokenizer
    """The model's."""
    train: Dataset
    """Training samples."""
    valid: Dataset | None
    """Validation samples; None where no loss is measured."""
    eval_batches: int
    """Validation micro-batches of each data parallel rank."""

    def _batches(self, dataset: Dataset, micro_batch_size: int, start_sample: int = 0) -> Iterable[Any]:
        return batches(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            start_sample=start_sample,
        )

    def train_batches(self, consumed_samples: int = 0) -> Iterable[Any]:
        """Training micro-batches from a sample on."""
        return self._batches(self.train, self.config.micro_batch_size, consumed_samples)

    def some_train_batches(self, samples: int, micro_batch_size: int) -> list[Any]:
        """The first `samples` training samples (over all ranks) as micro-batches; packed documents, no padding."""
        step = micro_batch_size * parallel_state.get_data_parallel_world_size()
        return list(islice(self._batches(self.train, micro_batch_size), max(samples // step, 1)))

    def calibration_batches(self, samples: int, micro_batch_size: int, packing: Packing = "pack") -> list[Any]:
        """Up to `samples` rows of whole training documents (over all ranks) as micro-batches; mock data gives its samples."""
        if self.config.mock:
            return self.some_train_batches(samples, micro_batch_size)
        return calibration_batches(
            training_documents(self.config, self.tokenizer),
            self.tokenizer,
            seq_length=self.config.seq_length,
            num_samples=samples,
            micro_batch_size=micro_batch_size,
            packing=packing,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )

    def proof_batches(self, count: int = 2) -> list[Any]:
        """A few micro-batches, whole and the same on every rank, to compare models on: of validation text where there is some."""
        whole = batches(self.valid or self.train, micro_batch_size=self.config.micro_batch_size, slice_cp=False)
        return list(islice(whole, count))

    def valid_batches(self) -> Iterable[Any]:
        """Validation micro-batches from the first one."""
        assert self.valid is not None, "the feed was opened without validation batches"
        return self._batches(self.valid, self.config.micro_batch_size)

    def loss(self, chunks: list[Any], model: str = "the model") -> float | None:
        """Validation loss in nats a token; None where none is measured. An error calls the chunks what `model` says."""
        return evaluate(chunks, self.valid_batches(), self.eval_batches, model=model) if self.eval_batches else None


def open_feed(config: DataConfig, tokenizer: str | Path, *, train_samples: int = 1, eval_batches: int, spare_batches: int = 0) -> Feed:
    """Datasets of `train_samples` samples, and of the larger of `eval_batches` and `spare_batches` micro-batches for every rank."""
    valid_samples = max(eval_batches, spare_batches) * config.micro_batch_size * parallel_state.get_data_parallel_world_size()
    loaded = load_tokenizer(tokenizer)
    train, valid = build_datasets(config, loaded, max(train_samples, 1), valid_samples)
    return Feed(config=config, tokenizer=loaded, train=train, valid=valid, eval_batches=eval_batches)


def count_parameters(chunks: list[Any]) -> int:
    """Parameters of one copy of the model over all ranks; rows that pad the vocabulary count."""
    mine = {shard.key: shard.global_shape for shard in parameter_shards(chunks)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    shapes = {key: shape for shapes in everyone for key, shape in shapes.items()}
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def directory_bytes(path: str | Path) -> int:
    """Bytes of all files under `path`."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
