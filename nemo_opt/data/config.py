"""Settings of the data: which text, how it is split and how it is cut into batches. No torch in this module."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.data.sources import DataSource, check_source, parse_data_paths
from nemo_opt.errors import ConfigError

__all__ = ["DataConfig", "cache_directory", "parse_split"]


def cache_directory() -> Path:
    """Where tokenised text and sample indices are kept when no directory is given: `$XDG_CACHE_HOME/nemo_opt/data`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_opt" / "data"


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test documents in `split`, normalised to a sum of 1.

    Raises:
        ConfigError: not one to three numbers >= 0 with a positive sum and a positive training share.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        raise ConfigError(f"split {split!r} is not of the form TRAIN,VALID,TEST, for instance 99,1,0") from None
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or shares[0] <= 0:
        raise ConfigError(f"split {split!r} needs one to three numbers >= 0, the first (training) positive, for instance 99,1,0")
    train, valid, test = (*shares, 0.0, 0.0)[:3]
    total = train + valid + test
    return train / total, valid / total, test / total


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of a run. `mock` must be asked for: a forgotten path is an error, not random numbers."""

    paths: list[str] | None = None
    """As NeMo's --data_paths: `PATH ...` or `WEIGHT PATH ...`; a PATH is a .jsonl, a .txt or the prefix of a .bin/.idx pair."""
    split: str = "99,1,0"
    """Shares of the documents for training, validation and test."""
    seq_length: int
    """Tokens of one sample."""
    micro_batch_size: int = 1
    """Samples of one forward pass of one data-parallel rank."""
    global_batch_size: int = 1
    """Samples of one optimizer step over all ranks."""
    mock: bool = False
    """Counting numbers instead of text, for timing; excludes `paths`."""
    index_mapping_dir: str | None = None
    """Directory of cached indices and tokenised text; None means `cache_directory()`."""
    seed: int = 1234
    """Order of the samples."""

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(f"global_batch_size {self.global_batch_size} % micro_batch_size {self.micro_batch_size} != 0")
        if self.mock and self.paths:
            raise ConfigError(f"mock data and data paths {self.paths} exclude each other; drop one")
        if not self.mock and not self.paths:
            raise ConfigError("no data paths given; name some, or ask for mock data explicitly")
        if self.paths:
            parse_data_paths(self.paths)
        parse_split(self.split)

    @property
    def sources(self) -> list[DataSource]:
        """The parsed `paths`; empty for mock data."""
        return parse_data_paths(self.paths) if self.paths else []

    @property
    def cache_dir(self) -> Path:
        """`index_mapping_dir` or its default."""
        return Path(self.index_mapping_dir).expanduser() if self.index_mapping_dir else cache_directory()

    def check(self) -> None:
        """Refuses missing, empty and truncated files (raises `DataError`); cheap, and needs no torch."""
        for source in self.sources:
            check_source(source)
