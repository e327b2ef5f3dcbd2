"""What a quantised Hugging Face directory says of itself: which linears are stored how, and what happens to inputs and to the KV cache.

Read are ModelOpt's form (`quant_method` modelopt, flat or nested, or `hf_quant_config.json` alone) and that of compressed-tensors, as
defined by `modelopt.torch.export` and by https://github.com/vllm-project/compressed-tensors. Loads no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.huggingface_config import read_json

__all__ = ["Description", "LinearForm", "is_quantized", "read_description"]

_CONFIG, _MODELOPT_CONFIG = "config.json", "hf_quant_config.json"
_PROJECTIONS = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
_REGEX = "re:"


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """How one linear is stored and fed."""

    weight: str
    """Key of `weights.LAYOUTS`."""
    inputs: str | None = None
    """Key of `rounding.ROUNDINGS`; None leaves inputs as they are."""
    group: tuple[int, int] = (1, 0)
    """Rows and columns that share a scale, where the layout has blocks."""
    may_scale_inputs: bool = False
    """Whether a `pre_quant_scale` may stand beside it."""
    label: str
    """For a person."""


_MODELOPT_FORMS = {
    "FP8": LinearForm(weight="fp8", inputs="fp8", label="FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN": LinearForm(weight="fp8_channel", inputs="fp8_token", label="FP8 per channel and token"),
    "FP8_PB_WO": LinearForm(weight="fp8_block", group=(128, 128), label="FP8 blocks, weights only"),
    "NVFP4": LinearForm(weight="nvfp4", inputs="nvfp4", group=(1, 16), label="NVFP4"),
    "W4A16_NVFP4": LinearForm(weight="nvfp4", group=(1, 16), label="NVFP4, weights only"),
    "MXFP8": LinearForm(weight="mxfp8", inputs="mxfp8", group=(1, 32), label="MXFP8"),
    "W4A16_AWQ": LinearForm(weight="int4_rows", group=(1, 128), may_scale_inputs=True, label="INT4, weights only"),
    "W4A8_AWQ": LinearForm(weight="w4a8", inputs="fp8", group=(1, 128), may_scale_inputs=True, label="W4A8"),
    "W8A8_SQ_PER_CHANNEL": LinearForm(weight="int8", inputs="int8", may_scale_inputs=True, label="INT8"),
    "W8A16": LinearForm(weight="int8", label="INT8, weights only"),
}
_GROUPED = ("NVFP4", "W4A16_NVFP4", "MXFP8", "W4A16_AWQ", "W4A8_AWQ", "FP8_PB_WO")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Of a directory."""

    config: dict[str, Any]
    """`config.json` without `quantization_config`."""
    linears: dict[str, LinearForm]
    """The quantised ones by name."""
    plain: list[str]
    """The others, the head included unless it is tied to the embedding."""
    cache: str | None
    """Format of the KV cache, fp8 or nvfp4."""


def is_quantized(directory: str | Path) -> bool:
    """Whether a Hugging Face directory announces quantised weights."""
    directory = Path(directory)
    return (directory / _MODELOPT_CONFIG).is_file() or bool(read_json(directory / _CONFIG).get("quantization_config"))


def read_description(directory: str | Path) -> Description:
    """The description of a quantised Llama.

    Raises:
        CheckpointError: There is no readable `config.json`, or the two files contradict each other.
        ConfigError: An architecture, method or format that is not known; names it, and the known ones.

    """
    directory = Path(directory)
    config = read_json(directory / _CONFIG)
    said = config.pop("quantization_config", None)
    if (architectures := config.get("architectures")) != ["LlamaForCausalLM"]:
        raise ConfigError(f"{directory} holds {architectures}: only LlamaForCausalLM is read")
    file = directory / _MODELOPT_CONFIG
    nested = read_json(file).get("quantization") if file.is_file() else None
    if said is None and nested is None:
        raise ConfigError(f"{directory} is not quantised: neither {_CONFIG} nor {_MODELOPT_CONFIG} says how")
    names = _linear_names(config)
    if said is not None and said.get("quant_method") == "compressed-tensors":
        forms, cache = _compressed_tensors(said, names), _cache_of(said.get("kv_cache_scheme"))
    elif said is None or str(said.get("quant_method", "")).startswith("modelopt"):
        forms, cache = _modelopt(directory, said, nested, names)
    else:
        raise ConfigError(f"{directory}: quant_method {said.get('quant_method')!r} is not known; known are modelopt and compressed-tensors")
    if not forms:
        raise ConfigError(f"{directory} announces quantisation, but names no linear of the model")
    return Description(config=config, linears=forms, plain=[name for name in names if name not in forms], cache=cache)


def _linear_names(config: Mapping[str, Any]) -> list[str]:
    layers = [f"model.layers.{layer}.{name}" for layer in range(config.get("num_hidden_layers", 0)) for name in _PROJECTIONS]
    return layers if config.get("tie_word_embeddings") else [*layers, "lm_head"]


def _modelopt(
    directory: Path, said: dict[str, Any] | None, nested: dict[str, Any] | None, names: list[str]
) -> tuple[dict[str, LinearForm], str | None]:
    inline = None if said is None else said.get("quantization", said)
    for key in ("quant_algo", "group_size"):
        pair = [None if part is None else part.get(key) for part in (inline, nested)]
        if None not in pair and pair[0] != pair[1]:
            raise CheckpointError(f"{directory}: {key} is {pair[0]} in {_CONFIG} and {pair[1]} in {_MODELOPT_CONFIG}")
    settings = {**(inline or {}), **(nested or {})}
    ignored = settings.get("exclude_modules") or settings.get("ignore") or []
    kept = [name for name in names if not any(fnmatch(name, pattern) or name == pattern for pattern in ignored)]
    layers = settings.get("quantized_layers") or {}
    if str(settings.get("quant_algo")).upper() == "MIXED_PRECISION":
        if unknown := sorted(layers.keys() - set(names)):
            raise ConfigError(f"{directory}: quantized_layers names {unknown[:4]}, which the model does not have")
        forms = {name: _modelopt_form(directory, layers[name]) for name in kept if name in layers}
    else:
        forms = {name: _modelopt_form(directory, settings) for name in kept}
    cache = settings.get("kv_cache_quant_algo")
    return forms, str(cache).lower() if cache else _cache_of(settings.get("kv_cache_scheme"))


def _modelopt_form(directory: Path, settings: Mapping[str, Any]) -> LinearForm:
    algo = str(settings.get("quant_algo")).upper()
    if algo not in _MODELOPT_FORMS:
        raise ConfigError(f"{directory}: quant_algo {settings.get('quant_algo')!r} is not known; known are {sorted(_MODELOPT_FORMS)}")
    form, size = _MODELOPT_FORMS[algo], settings.get("group_size")
    if algo not in _GROUPED or not size:
        return form
    return LinearForm(**{**vars(form), "group": (size if algo == "FP8_PB_WO" else 1, size)})


def _compressed_tensors(said: Mapping[str, Any], names: list[str]) -> dict[str, LinearForm]:
    forms: dict[str, LinearForm] = {}
    for group in (said.get("config_groups") or {}).values():
        form = _compressed_form(group, group.get("format") or said.get("format"))
        forms |= {name: form for name in names if _matches(name, group.get("targets") or []) and name not in forms}
    ignored = said.get("ignore") or []
    return {name: form for name, form in forms.items() if not _matches(name, [entry for entry in ignored if entry != "Linear"])}


def _matches(name: str, targets: list[str]) -> bool:
    return any(re.match(t.removeprefix(_REGEX), name) if t.startswith(_REGEX) else t in (name, "Linear") for t in targets)


def _compressed_form(group: Mapping[str, Any], layout: str | None) -> LinearForm:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), layout)
    rows, columns = weights.get("block_structure") or (1, weights.get("group_size") or 0)
    known = {
        (8, "int", "channel", "int-quantized"): "int8",
        (8, "int", "channel", "pack-quantized"): "int8_words",
        (4, "int", "group", "pack-quantized"): "int4_words",
        (8, "float", "tensor", "float-quantized"): "fp8",
        (8, "float", "channel", "float-quantized"): "fp8_channel",
        (8, "float", "block", "float-quantized"): "fp8_block",
    }
    if kind not in known or weights.get("symmetric") is False or weights.get("actorder"):
        raise ConfigError(f"weights stored as {dict(weights)} in {layout!r} are not known; known are {sorted(map(str, known))}, symmetric")
    form = None if inputs is None else _compressed_inputs(inputs)
    label = f"{'INT' if weights['type'] == 'int' else 'FP'}{weights['num_bits']}"
    label += {"block": " blocks"}.get(weights["strategy"], "") + ("" if form else ", weights only")
    return LinearForm(weight=known[kind], inputs=form, group=(rows, columns), label=label)


def _compressed_inputs(inputs: Mapping[str, Any]) -> str:
    kind = (inputs.get("num_bits"), inputs.get("type"), inputs.get("strategy"), bool(inputs.get("dynamic")))
    known = {
        (8, "int", "tensor", False): "int8",
        (8, "float", "tensor", False): "fp8",
        (8, "float", "token", True): "fp8_token",
        (8, "int", "token", True): "int8_token",
    }
    if kind not in known or inputs.get("symmetric") is False:
        raise ConfigError(f"inputs rounded by {dict(inputs)} are not known; known are {sorted(map(str, known))}, symmetric")
    return known[kind]


def _cache_of(scheme: Any) -> str | None:
    if not scheme:
        return None
    if isinstance(scheme, str) and scheme.lower() in ("fp8", "nvfp4"):
        return scheme.lower()
    if isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float") and not scheme.get("dynamic"):
        return "fp8"
    raise ConfigError(f"a KV cache quantised by {scheme} is not known; known are FP8 with one static scale, and NVFP4")
