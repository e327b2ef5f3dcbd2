"""What to quantise, on which data, and where to put it: NeMo's two configuration classes, validated before torch is loaded.

Both generations of NeMo are read: dataclasses of its `llm` collection, and the mappings (OmegaConf) of its first `Quantizer`, whose
keys are translated by `_FIRST_GENERATION`. No setting is silently ignored. `recipes` says which quantizers a configuration stands for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from nemo_opt.errors import ConfigError

__all__ = ["ALGORITHMS", "EXPORT_FORMATS", "SEARCHABLE", "ExportConfig", "QuantizationConfig", "is_recipe_file"]

ALGORITHMS = ("block_fp8", "fp8", "int4", "int4_awq", "int8", "int8_sq", "mxfp8", "nvfp4", "w4a8_awq")
"""Algorithms by NeMo's names, and mxfp8: proven from calibration on every layout to the export."""

SEARCHABLE = ("block_fp8", "fp8", "int4", "int8", "mxfp8", "nvfp4")
"""Those calibrated by maxima alone, among which a search for mixed precision may choose."""

_RECIPE_SUFFIXES = (".json", ".yaml", ".yml")
_KV_FORMATS = ("fp8", "nvfp4")
EXPORT_FORMATS = ("nemo", "hf", "trtllm")
"""NeMo's export formats: a sharded checkpoint, a Hugging Face directory, a TensorRT-LLM checkpoint."""
_DTYPES = (16, "16", "bf16")


def is_recipe_file(algorithm: str) -> bool:
    """Whether an algorithm is given as a file rather than by name."""
    return algorithm.endswith(_RECIPE_SUFFIXES)


class _FromAny:
    """Reading of dataclasses, mappings and OmegaConf; a config equals the mapping it was made from."""

    _FIRST_GENERATION: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_any(cls, values: Any) -> Self:
        """A validated config from a config, a mapping or an OmegaConf node.

        Raises:
            ConfigError: on unknown keys (naming the known ones) and on bad values.

        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{cls.__name__} is read from a dataclass or a mapping, got {type(values).__name__}: pass {cls.__name__}(...)"
            )
        given = {cls._FIRST_GENERATION.get(str(key), str(key)): value for key, value in values.items()}
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(given.keys() - set(known)):
            raise ConfigError(f"unknown settings {unknown} for {cls.__name__}; known are {known}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"incomplete {cls.__name__}: {error}") from None

    def _equals(self, other: object) -> bool:
        if isinstance(other, Mapping):
            try:
                other = self.from_any(other)
            except ConfigError:
                return False
        return type(other) is type(self) and asdict(self) == asdict(other)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(_FromAny):
    """How to quantise; fields and defaults of NeMo's class."""

    algorithm: str | None = "fp8"
    """One of `ALGORITHMS`, ModelOpt's name of a configuration (`..._CFG`), a JSON or YAML file of one, or None: nothing is done."""
    awq_block_size: int = 128
    """Weights of a row that share a scale in int4, int4_awq and w4a8_awq."""
    fp8_block_shape: tuple[int, int] = (128, 128)
    """Rows and columns of the blocks that share a scale in block_fp8."""
    weight_only: bool = False
    """Leave activations as they are, whatever the algorithm says."""
    sq_alpha: float = 0.5
    """SmoothQuant's migration strength."""
    enable_kv_cache: bool | None = None
    """Quantise the KV cache. None means NeMo's rule: yes beside a named algorithm without int8, unless the decoder type is gpt."""
    kv_cache_qformat: str | None = None
    """fp8 (the default) or nvfp4. Beside int8 it must be spelled out: NeMo's first generation, whose tests enable the cache, leaves it."""
    calibration_dataset: str = "cnn_dailymail"
    """Name or path of the calibration text; the caller resolves it to batches."""
    calibration_dataset_size: int = 512
    """Calibration samples over all data-parallel ranks."""
    calibration_batch_size: int = 64
    """Samples of one micro-batch."""
    calibration_seq_len: int = 128
    """Tokens of one sample."""
    calibration_packing: Literal["pack", "pad"] = "pack"
    """Rows full of documents that do not attend to each other, or one document a row with padding that no statistic counts."""
    decoder_type: str | None = None
    """Kind of decoder, which the first generation kept here."""

    _FIRST_GENERATION: ClassVar[dict[str, str]] = {"calib_dataset": "calibration_dataset", "num_calib_size": "calibration_dataset_size"}

    def __post_init__(self) -> None:
        _check_algorithm(self.algorithm)
        for name in ("awq_block_size", "calibration_dataset_size", "calibration_batch_size", "calibration_seq_len"):
            _check_positive_integer(name, getattr(self, name))
        if not 0.0 <= self.sq_alpha <= 1.0:
            raise ConfigError(f"sq_alpha must lie in 0..1, got {self.sq_alpha!r}")
        if self.enable_kv_cache not in (None, True, False):
            raise ConfigError(f"enable_kv_cache must be True, False or None, got {self.enable_kv_cache!r}")
        if self.kv_cache_qformat not in (None, *_KV_FORMATS):
            raise ConfigError(f"Unsupported kv cache quantization format {self.kv_cache_qformat!r}; known are {list(_KV_FORMATS)}")
        if self.calibration_packing not in ("pack", "pad"):
            raise ConfigError(f"calibration_packing must be 'pack' or 'pad', got {self.calibration_packing!r}")
        _check_bool("weight_only", self.weight_only)
        object.__setattr__(self, "fp8_block_shape", _pair_of_sizes("fp8_block_shape", self.fp8_block_shape))

    def __eq__(self, other: object) -> bool:
        return self._equals(other)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_FromAny):
    """Where and how to write the result; fields and defaults of NeMo's class."""

    path: Path | str
    """Directory to write."""
    export_format: str = "trtllm"
    """One of `EXPORT_FORMATS`."""
    dtype: str | int = "bf16"
    """Type of the layers that are not quantised, in formats that convert them (a "nemo" checkpoint keeps the model's own type)."""
    decoder_type: str | None = None
    """Kind of decoder, for TensorRT-LLM."""
    inference_tp: int = 1
    """Tensor-parallel ranks the export is cut for."""
    inference_pp: int = 1
    """Pipeline stages the export is cut for."""
    generate_sample: bool = False
    """Continue two fixed prompts with the quantised model, for a person to look at."""

    _FIRST_GENERATION: ClassVar[dict[str, str]] = {
        "inference_tensor_parallel": "inference_tp",
        "inference_pipeline_parallel": "inference_pp",
        "save_path": "path",
        "sample_output": "generate_sample",
    }

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise ConfigError(f"path must name a directory, got {self.path!r}")
        object.__setattr__(self, "path", Path(self.path))
        if self.export_format not in EXPORT_FORMATS:
            raise ConfigError(f"Unsupported export format {self.export_format!r}; known are {list(EXPORT_FORMATS)}")
        if self.dtype not in _DTYPES or isinstance(self.dtype, bool):
            raise ConfigError(f"Unsupported export dtype {self.dtype!r}; known are {list(_DTYPES)}")
        for name in ("inference_tp", "inference_pp"):
            _check_positive_integer(name, getattr(self, name))
        _check_bool("generate_sample", self.generate_sample)

    def __eq__(self, other: object) -> bool:
        return self._equals(other)


def _check_algorithm(algorithm: Any) -> None:
    if algorithm is None or algorithm in ALGORITHMS:
        return
    if not isinstance(algorithm, str) or not (algorithm.endswith("_CFG") or is_recipe_file(algorithm)):
        raise ConfigError(
            f"Unsupported quantization algorithm {algorithm!r}; choose one of {list(ALGORITHMS)}, a configuration of ModelOpt (..._CFG), "
            f"a file ({', '.join(_RECIPE_SUFFIXES)}) or None"
        )
    if is_recipe_file(algorithm) and not Path(algorithm).is_file():
        raise ConfigError(f"the recipe {algorithm} does not exist")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def _pair_of_sizes(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} must be two sizes, rows and columns, got {value!r}")
    for size in value:
        _check_positive_integer(name, size)
    return value[0], value[1]


def _check_positive_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
