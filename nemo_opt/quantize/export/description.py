"""What an export says of itself: `quantization_config` in `config.json`, in the form that engines read for the formats at hand.

Decisions (docs/exports.md has the consumers, with sources):
- FP8, NVFP4, MXFP8 and W4A8 in ModelOpt's form, which vLLM and TensorRT-LLM read (the last one TensorRT-LLM alone); INT8, block FP8, and
  FP8 of weights alone in that of compressed-tensors, which vLLM and transformers read. INT4 in the latter, unless a `pre_quant_scale` must
  be written: only TensorRT-LLM has a place for it, in ModelOpt's W4A16_AWQ.
- Block FP8 is not written as ModelOpt's FP8_PB_WO or in DeepSeek's form: the engines that read these round the inputs as well, which the
  model at hand does not.
- A model with several formats keeps one form for all of them, since `quantization_config` has one `quant_method`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.export.formats import Kind, LinearFormat

__all__ = ["COMPRESSED_TENSORS", "MODELOPT", "Description", "choose_method", "describe"]

MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"

_ALGOS = {Kind.FP8: "FP8", Kind.NVFP4: "NVFP4", Kind.MXFP8: "MXFP8", Kind.W4A8: "W4A8_AWQ", Kind.INT4: "W4A16_AWQ"}
_WEIGHTS_ONLY = {Kind.NVFP4: "W4A16_NVFP4"}
_GROUPS = {Kind.NVFP4: 16, Kind.MXFP8: 32}
_AWQ = (Kind.INT4, Kind.W4A8)


@dataclass(frozen=True, kw_only=True)
class Description:
    """JSON of an export."""

    quantization_config: dict[str, Any]
    """For `config.json`."""
    documents: dict[str, dict[str, Any]]
    """Further files by name."""


def choose_method(formats: Mapping[str, LinearFormat], *, writes_scales: bool, cache: str | None) -> str:
    """`MODELOPT` or `COMPRESSED_TENSORS`: the form that can say all of it.

    Args:
        formats: Of the linears.
        writes_scales: Whether a `pre_quant_scale` stays beside a linear.
        cache: Format of the KV cache.

    Raises:
        ConfigError: Neither form can; names two linears that do not go together, or the one that goes nowhere.

    """
    compressed = {name: _in_compressed_tensors(form, writes_scales, cache) for name, form in formats.items()}
    modelopt = {name: _in_modelopt(form) for name, form in formats.items()}
    if all(modelopt.values()) and not (all(compressed.values()) and any(form.kind is Kind.INT4 for form in formats.values())):
        return MODELOPT
    if all(compressed.values()):
        return COMPRESSED_TENSORS
    first = next(name for name, fits in modelopt.items() if not fits)
    second = next(name for name, fits in compressed.items() if not fits)
    raise ConfigError(
        f"no form of export holds both {first} ({_said(formats[first])}) and {second} ({_said(formats[second])}) with the KV cache in "
        f"{cache or 'full precision'}: export_format='nemo' keeps them"
    )


def describe(
    formats: Mapping[str, LinearFormat], method: str, *, unquantized: Sequence[str], cache: str | None, writes_scales: bool
) -> Description:
    """The JSON of an export.

    Args:
        formats: Of the linears by their Hugging Face names, such as `model.layers.3.mlp.down_proj`.
        method: From `choose_method`.
        unquantized: Hugging Face names of the other linears.
        cache: Format of the KV cache.
        writes_scales: Whether a `pre_quant_scale` stays beside a linear.

    """
    if method == COMPRESSED_TENSORS:
        return Description(quantization_config=_compressed_tensors(formats, unquantized, cache), documents={})
    quantization = _modelopt(formats, unquantized, cache, writes_scales)
    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}  # whose form it is; engines look for the name
    flat = {
        "quant_method": MODELOPT,
        **{name: value for name, value in quantization.items() if name not in ("kv_cache_quant_algo", "exclude_modules")},
        "ignore": quantization["exclude_modules"],
        "producer": producer,
    }
    if cache == "fp8":
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    elif cache is not None:
        flat["quantization"] = quantization  # engines read an NVFP4 cache from ModelOpt's older, nested form only
    return Description(
        quantization_config=flat, documents={"hf_quant_config.json": {"producer": producer, "quantization": dict(quantization)}}
    )


def _in_modelopt(form: LinearFormat) -> bool:
    return form.kind in _ALGOS and (form.kind is not Kind.FP8 or form.quantizes_inputs)


def _in_compressed_tensors(form: LinearFormat, writes_scales: bool, cache: str | None) -> bool:
    return form.kind in (Kind.FP8, Kind.FP8_BLOCK, Kind.INT8, Kind.INT4) and not writes_scales and cache != "nvfp4"


def _said(form: LinearFormat) -> str:
    return f"{form.kind}{'' if form.quantizes_inputs else ', weights only'}"


def _modelopt(formats: Mapping[str, LinearFormat], unquantized: Sequence[str], cache: str | None, writes_scales: bool) -> dict[str, Any]:
    layers = {name: _modelopt_layer(form, writes_scales) for name, form in formats.items()}
    common: dict[str, Any] = {"kv_cache_quant_algo": cache and cache.upper(), "exclude_modules": list(unquantized)}
    if len(set(formats.values())) == 1:
        return {**next(iter(layers.values())), **common}
    return {"quant_algo": "MIXED_PRECISION", **common, "quantized_layers": layers}


def _modelopt_layer(form: LinearFormat, writes_scales: bool) -> dict[str, Any]:
    algo = _ALGOS[form.kind] if form.quantizes_inputs or form.kind not in _WEIGHTS_ONLY else _WEIGHTS_ONLY[form.kind]
    layer: dict[str, Any] = {"quant_algo": algo}
    if form.kind in _GROUPS or form.kind in _AWQ:
        layer["group_size"] = _GROUPS.get(form.kind, form.block[1])
    return layer | ({"has_zero_point": False, "pre_quant_scale": writes_scales} if form.kind in _AWQ else {})


def _compressed_tensors(formats: Mapping[str, LinearFormat], unquantized: Sequence[str], cache: str | None) -> dict[str, Any]:
    groups: dict[LinearFormat, list[str]] = {}
    for name, form in formats.items():
        groups.setdefault(form, []).append(name)
    layouts = [_layout(form) for form in groups]
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": layouts[0] if len(set(layouts)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(unquantized),
        "kv_cache_scheme": cache and _arguments(8, "float", "tensor"),
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _weight_arguments(form),
                "input_activations": _input_arguments(form) if form.quantizes_inputs else None,
                "output_activations": None,
                "format": layouts[number],
            }
            for number, (form, names) in enumerate(groups.items())
        },
    }


def _layout(form: LinearFormat) -> str:
    if form.kind is Kind.INT4 or (form.kind is Kind.INT8 and not form.quantizes_inputs):
        return "pack-quantized"
    return "int-quantized" if form.kind is Kind.INT8 else "float-quantized"


def _weight_arguments(form: LinearFormat) -> dict[str, Any]:
    if form.kind is Kind.INT4:
        return _arguments(4, "int", "group") | {"group_size": form.block[1]}
    if form.kind is Kind.INT8:
        return _arguments(8, "int", "channel")
    if form.kind is Kind.FP8_BLOCK:
        return _arguments(8, "float", "block") | {"block_structure": list(form.block)}
    return _arguments(8, "float", "tensor")


def _input_arguments(form: LinearFormat) -> dict[str, Any]:
    return _arguments(8, "int" if form.kind is Kind.INT8 else "float", "tensor")


def _arguments(num_bits: int, kind: str, strategy: str) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
