"""How each linear of a model is quantised, in the words of exports, from the settings of its quantizers; refused where no export has it.

Decisions:
- A format is what a consumer needs to know: how values are coded, which of them share a scale, and whether inputs are quantised too.
- What no form of export can say (other bits, asymmetric or dynamic integers, a quantised output or query) is refused by name, with the
  sharded checkpoint as the alternative: dropping a quantizer would ship another model than the one that was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.tensors import QuantizerSettings

__all__ = ["Kind", "LinearFormat", "cache_format", "linear_formats"]

_WEIGHT, _INPUT = ".weight_quantizer", ".input_quantizer"
_KEY, _VALUE = ".core_attention.k_bmm_quantizer", ".core_attention.v_bmm_quantizer"
_E4M3, _E2M1 = (4, 3), (2, 1)
_NVFP4_BLOCK, _MXFP8_BLOCK = 16, 32
_ALTERNATIVE = "no engine reads that from a Hugging Face directory; export_format='nemo' keeps it"


class Kind(StrEnum):
    """How the values of a weight are coded."""

    FP8 = "fp8"
    """E4M3 with one scale."""
    FP8_BLOCK = "block_fp8"
    """E4M3 with a scale for each two-dimensional block; inputs stay as they are."""
    INT8 = "int8"
    """Integers of 8 bits with a scale for each row."""
    INT4 = "int4"
    """Integers of 4 bits with a scale for each block of a row; inputs stay as they are."""
    W4A8 = "w4a8"
    """INT4, its products with the scales rounded to E4M3 with one more scale; inputs are E4M3."""
    NVFP4 = "nvfp4"
    """E2M1 with an E4M3 scale for 16 values, and one more scale."""
    MXFP8 = "mxfp8"
    """E4M3 with a power of two for 32 values; inputs likewise."""


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """Of one linear."""

    kind: Kind
    """How its weight is coded."""
    block: tuple[int, int] = (1, 0)
    """Rows and columns that share a scale, for FP8_BLOCK, INT4 and W4A8."""
    quantizes_inputs: bool
    """Whether its inputs are rounded as well."""

    @property
    def has_row_scales(self) -> bool:
        """Whether multiplying a row multiplies its scales and changes nothing else."""
        return self.kind in (Kind.INT8, Kind.INT4)


def linear_formats(settings: Mapping[str, QuantizerSettings]) -> dict[str, LinearFormat]:
    """The quantised linears by Megatron's name, such as `decoder.layers.3.mlp.linear_fc1`.

    Args:
        settings: Of every enabled quantizer (`quantizer_settings`).

    Raises:
        ConfigError: A quantizer that no export can express; names it.

    """
    known = (_WEIGHT, f"{_WEIGHT}.0", f"{_WEIGHT}.1", _INPUT, _KEY, _VALUE)
    if unknown := sorted(name for name in settings if not name.endswith(known)):
        raise ConfigError(f"{unknown[0]} is enabled: {_ALTERNATIVE}")
    weights = {name.split(_WEIGHT)[0] for name in settings if _WEIGHT in name}
    if lonely := sorted(name for name in settings if name.endswith(_INPUT) and name.removesuffix(_INPUT) not in weights):
        raise ConfigError(f"{lonely[0]} is enabled, but the weight beside it is not quantised: {_ALTERNATIVE}")
    if outside := sorted(name for name in weights if not name.startswith("decoder.layers.")):
        raise ConfigError(f"{outside[0]} is quantised; exports leave the embedding and the head as they are: {_ALTERNATIVE}")
    return {name: _format(name, settings) for name in sorted(weights)}


def cache_format(settings: Mapping[str, QuantizerSettings]) -> str | None:
    """Format of the KV cache, fp8 or nvfp4; None where it is not quantised.

    Raises:
        ConfigError: Only some layers' caches are quantised, or in another format.

    """
    found = {name: _cache_format(name, setting) for name, setting in settings.items() if name.endswith((_KEY, _VALUE))}
    if not found:
        return None
    layers = {name.split(".core_attention")[0] for name in settings if ".self_attention." in name}
    if len(set(found.values())) > 1 or len(found) != 2 * len({name.rsplit(".self_attention", 1)[0] for name in layers}):
        raise ConfigError(f"the KV caches of {len(found) // 2} layers are quantised, to {sorted(set(found.values()))}: {_ALTERNATIVE}")
    return next(iter(found.values()))


def _cache_format(name: str, setting: QuantizerSettings) -> str:
    if setting.num_bits == _E4M3 and setting.block_sizes is None and setting.axis is None:
        return "fp8"
    if _is_nvfp4(setting):
        return "nvfp4"
    raise ConfigError(f"{name} rounds by {setting}: {_ALTERNATIVE}")


def _format(name: str, settings: Mapping[str, QuantizerSettings]) -> LinearFormat:
    first = settings.get(f"{name}{_WEIGHT}") or settings.get(f"{name}{_WEIGHT}.0")
    second, inputs = settings.get(f"{name}{_WEIGHT}.1"), settings.get(f"{name}{_INPUT}")
    kind = None if first is None else _kind(first, second)
    if kind is None or not _inputs_fit(kind, inputs):
        raise ConfigError(f"{name} is quantised by {[first, second, inputs]}: {_ALTERNATIVE}")
    sizes = (first.block_sizes if first else None) or {}
    block = (sizes.get(-2) or 1, sizes.get(-1) or 0)
    return LinearFormat(kind=kind, block=block, quantizes_inputs=inputs is not None)


def _kind(first: QuantizerSettings, second: QuantizerSettings | None) -> Kind | None:
    sizes = first.block_sizes or {}
    is_int4_block = first.num_bits == 4 and bool(sizes.get(-1)) and not sizes.get(-2) and not first.is_dynamic
    if second is not None:
        return Kind.W4A8 if is_int4_block and _is_fp8(second) else None
    if is_int4_block:
        return Kind.INT4
    if _is_fp8(first):
        return Kind.FP8
    if first.num_bits == _E4M3 and sizes.get(-1) and sizes.get(-2) and not first.is_dynamic:
        return Kind.FP8_BLOCK
    if first.num_bits == 8 and first.axis in (0, (0,)) and not sizes:
        return Kind.INT8
    if _is_nvfp4(first):
        return Kind.NVFP4
    return Kind.MXFP8 if _is_mxfp8(first) else None


def _inputs_fit(kind: Kind, inputs: QuantizerSettings | None) -> bool:
    if inputs is None:
        return kind not in (Kind.W4A8, Kind.MXFP8)
    if kind in (Kind.FP8, Kind.W4A8):
        return _is_fp8(inputs)
    if kind is Kind.INT8:
        return inputs.num_bits == 8 and inputs.axis is None and inputs.block_sizes is None
    return (kind is Kind.NVFP4 and _is_nvfp4(inputs)) or (kind is Kind.MXFP8 and _is_mxfp8(inputs))


def _is_fp8(setting: QuantizerSettings) -> bool:
    return setting.num_bits == _E4M3 and setting.axis is None and setting.block_sizes is None


def _is_nvfp4(setting: QuantizerSettings) -> bool:
    sizes = setting.block_sizes or {}
    return setting.num_bits == _E2M1 and setting.is_dynamic and sizes.get(-1) == _NVFP4_BLOCK and sizes.get("scale_bits") == _E4M3


def _is_mxfp8(setting: QuantizerSettings) -> bool:
    sizes = setting.block_sizes or {}
    return setting.num_bits == _E4M3 and setting.is_dynamic and sizes.get(-1) == _MXFP8_BLOCK and sizes.get("scale_bits") == (8, 0)
