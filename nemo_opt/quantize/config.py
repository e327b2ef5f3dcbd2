"""What to quantise, on which data, and where to put it: NeMo's two configuration classes, validated before torch is loaded.

Both generations of NeMo are read: dataclasses of its `llm` collection, and the mappings (OmegaConf) of its first `Quantizer`, whose
keys are translated by `_FIRST_GENERATION`. Values that NeMo accepts and nemo_opt does not implement yet are refused by name, so that
no setting is silently ignored. `enable_kv_cache=True` beside int8 is accepted with a warning and has no effect: there is no int8 KV format,
and NeMo's first generation, whose tests do this, leaves the cache alone too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from nemo_opt.errors import ConfigError

__all__ = ["ALGORITHMS", "EXPORT_FORMATS", "ExportConfig", "QuantizationConfig"]

ALGORITHMS = ("fp8", "int8")
"""Algorithms that are proven end to end: calibration on every layout, save, restore on another layout."""

_LATER_ALGORITHMS = ("block_fp8", "int4", "int4_awq", "int8_sq", "mxfp8", "nvfp4", "w4a8_awq")
_KV_FORMATS = ("fp8", "nvfp4")
EXPORT_FORMATS = ("nemo", "hf", "trtllm")
"""NeMo's export formats; `Quantizer.export` writes "nemo" for now."""
_DTYPES = (16, "16", "bf16")


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
    """One of `ALGORITHMS`; None leaves the model untouched."""
    awq_block_size: int = 128
    """Weights that share a scale in AWQ algorithms."""
    sq_alpha: float = 0.5
    """SmoothQuant's migration strength."""
    enable_kv_cache: bool | None = None
    """Quantise the KV cache. None means no for now, where NeMo would do it for fp8; True is refused for fp8 and has no effect for int8."""
    kv_cache_qformat: str = "fp8"
    """Format of a quantised KV cache."""
    calibration_dataset: str = "cnn_dailymail"
    """Name or path of the calibration text; the caller resolves it to batches."""
    calibration_dataset_size: int = 512
    """Calibration samples over all data-parallel ranks."""
    calibration_batch_size: int = 64
    """Samples of one micro-batch."""
    calibration_seq_len: int = 128
    """Tokens of one sample."""
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
        if self.enable_kv_cache and self.kv_cache_qformat not in _KV_FORMATS:
            raise ConfigError(f"Unsupported kv cache quantization format {self.kv_cache_qformat!r}; known are {list(_KV_FORMATS)}")
        if self.enable_kv_cache and self.algorithm == "fp8":
            raise ConfigError("enable_kv_cache=True is not supported yet with algorithm 'fp8'; set it to False")

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
    """Generate text from two fixed prompts before exporting; refused for now."""

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
        if self.generate_sample:
            raise ConfigError("generate_sample is not supported yet; compare the losses before and after instead")

    def __eq__(self, other: object) -> bool:
        return self._equals(other)


def _check_algorithm(algorithm: str | None) -> None:
    if algorithm is None or algorithm in ALGORITHMS:
        return
    if algorithm in _LATER_ALGORITHMS:
        raise ConfigError(f"algorithm {algorithm!r} is not supported yet; choose one of {list(ALGORITHMS)} or None")
    raise ConfigError(f"Unsupported quantization algorithm {algorithm!r}; choose one of {list(ALGORITHMS)} or None")


def _check_positive_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
