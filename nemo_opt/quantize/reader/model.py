"""A quantised Hugging Face directory as a model that computes what an engine would: transformers' Llama, dequantised, with rounded inputs.

Decisions:
- Nothing of the exports, of ModelOpt or of Megatron-Core takes part, so that agreement with the model in memory means something.
- A directory is read only if it holds exactly the tensors that its description asks for. One scale too few or too many is an error.
- Keys and values are rounded where a cache would store them: after the rotary embedding, before attention.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from nemo_opt.errors import CheckpointError
from nemo_opt.models.safetensors_dir import SafetensorsReader
from nemo_opt.quantize.reader.description import Description, LinearForm, read_description
from nemo_opt.quantize.reader.rounding import ROUNDINGS, STATIC
from nemo_opt.quantize.reader.weights import linear_tensors, read_weight

__all__ = ["ExportedModel", "open_export"]

_FLOATS = ("F32", "BF16", "F16", "F64")
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I8": 8, "U8": 8}
_IGNORED = ("rotary_emb.inv_freq",)
_SHOWN = 6

Allowed = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Dtypes and shapes that a tensor may have."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A directory that was read and found consistent."""

    description: Description
    """What it says of itself."""
    model: Any
    """transformers' LlamaForCausalLM in float32, with hooks that scale and round inputs."""
    cache_scales: list[tuple[torch.Tensor, torch.Tensor]] | None
    """For each layer the scales of keys and values; None where the cache is not quantised."""
    input_scales: dict[str, float]
    """By linear, where inputs are rounded with a stored scale."""
    bits_per_weight: float
    """Of the quantised linears, scales included."""
    bits_per_parameter: float
    """Of the whole model."""
    parameters: int
    """As transformers counts them."""

    @property
    def formats(self) -> dict[str, int]:
        """How many linears have which format."""
        counts = Counter(form.label for form in self.description.linears.values())
        return dict(sorted(counts.items())) | ({"unquantised": len(self.description.plain)} if self.description.plain else {})

    def logits(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:  # noqa: N803
        """[B, S, V] in float32."""
        options: dict[str, Any] = {"use_cache": False}
        if self.cache_scales is not None:
            assert self.description.cache is not None
            cache = _rounding_cache(self.model.config, self.description.cache, self.cache_scales)
            options = {"use_cache": True, "past_key_values": cache}
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=tokens_BS, position_ids=positions_BS, **options).logits
        return logits.float()


def open_export(directory: str | Path, *, device: torch.device | str = "cpu") -> ExportedModel:
    """Reads a quantised Hugging Face Llama, whoever wrote it.

    Args:
        directory: Holds `config.json` and safetensors files.
        device: Where the model is put.

    Raises:
        CheckpointError: Truncated or contradictory files; a tensor that is missing, not expected, or of another dtype or shape: named.
        ConfigError: A method or format that is not known.

    """
    from transformers import LlamaConfig, LlamaForCausalLM

    description = read_description(directory)
    reader = SafetensorsReader(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict({n: v for n, v in description.config.items() if n not in ("dtype", "torch_dtype")}))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items() if not _is_tied(name, description)}
    bits = _check(directory, reader, description, shapes)
    weights = {name: _weight(reader, name, description, shape).to(device) for name, shape in shapes.items()}
    if _is_tied("lm_head.weight", description):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)  # its frequencies are no weights
    model.eval().requires_grad_(False)
    for name, form in description.linears.items():
        _hook(model.get_submodule(name), form, reader, name, device)
    quantized = sum(prod(shapes[f"{name}.weight"]) for name in description.linears)
    parameters = sum(prod(shape) for shape in shapes.values())
    return ExportedModel(
        description=description,
        model=model,
        cache_scales=_cache_scales(reader, description, device),
        input_scales={name: float(reader.whole(f"{name}.input_scale")) for name, form in description.linears.items() if _has_scale(form)},
        bits_per_weight=sum(bits[name] for name in description.linears) / quantized,
        bits_per_parameter=sum(bits.values()) / parameters,
        parameters=parameters,
    )


def _has_scale(form: LinearForm) -> bool:
    return form.inputs in STATIC


def _is_tied(name: str, description: Description) -> bool:
    return name == "lm_head.weight" and bool(description.config.get("tie_word_embeddings"))


def _check(directory: str | Path, reader: SafetensorsReader, description: Description, shapes: Mapping[str, Any]) -> Counter[str]:
    """Refuses all but the expected tensors; gives bits of storage by linear, and under "" of the rest."""
    expected = _expected(reader, description, shapes)
    optional = {f"{name}.pre_quant_scale": name for name, form in description.linears.items() if form.may_scale_inputs}
    allowed = expected.keys() | optional.keys() | {name for name in reader.names if name.endswith(_IGNORED)}
    allowed |= {"lm_head.weight"} if _is_tied("lm_head.weight", description) else set()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - reader.names)]
    problems += [f"{name} has no place in the model" for name in sorted(reader.names - allowed)]
    for name in sorted(expected.keys() & reader.names):
        dtypes, allowed_shapes = expected[name]
        if reader.dtype(name) not in dtypes:
            problems.append(f"{name} is {reader.dtype(name)}, not {' or '.join(dtypes)}")
        elif reader.shape(name) not in allowed_shapes:
            problems.append(f"{name} has shape {reader.shape(name)}, not {' or '.join(map(str, allowed_shapes))}")
    problems += _partial(reader, description)
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{directory} is not what its description says: {'; '.join(problems[:_SHOWN])}{more}")
    bits: Counter[str] = Counter()
    for name in reader.names & (expected.keys() | optional.keys()):
        owner = name.rpartition(".")[0]
        bits[owner if owner in description.linears else ""] += prod(reader.shape(name)) * _BITS.get(reader.dtype(name), 8)
    return bits


def _expected(reader: SafetensorsReader, description: Description, shapes: Mapping[str, Any]) -> dict[str, Allowed]:
    expected: dict[str, Allowed] = {}
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        if (form := description.linears.get(linear)) is None:
            expected[name] = (_FLOATS, (shape,))
        else:
            expected |= {f"{linear}.{suffix}": allowed for suffix, allowed in linear_tensors(form, *shape).items()}
    if description.cache is not None:
        expected |= dict.fromkeys(_cache_names(reader, description), (_FLOATS, ((), (1,))))
    return expected


def _partial(reader: SafetensorsReader, description: Description) -> list[str]:
    """A `pre_quant_scale` that some layers have and others lack."""
    problems = []
    for projection in {name.split(".", 3)[-1] for name in description.linears}:
        names = [f"{name}.pre_quant_scale" for name in description.linears if name.split(".", 3)[-1] == projection]
        present = [name for name in names if name in reader.names]
        problems += [f"{name} is missing, other layers have it" for name in names if present and name not in present]
    return problems


def _cache_names(reader: SafetensorsReader, description: Description) -> list[str]:
    """Of keys and values by layer: beside the projections as ModelOpt has them, or one level up as compressed-tensors does."""
    prefixes = [f"model.layers.{layer}.self_attn" for layer in range(description.config["num_hidden_layers"])]
    above = [f"{prefix}.{part}_scale" for prefix in prefixes for part in "kv"]
    beside = [f"{prefix}.{part}_proj.{part}_scale" for prefix in prefixes for part in "kv"]
    return above if reader.names & set(above) else beside


def _cache_scales(reader: SafetensorsReader, description: Description, device: torch.device | str) -> Any:
    if description.cache is None:
        return None
    values = [reader.whole(name).float().reshape(()).to(device) for name in _cache_names(reader, description)]
    return list(zip(values[0::2], values[1::2], strict=True))


def _weight(reader: SafetensorsReader, name: str, description: Description, shape: tuple[int, ...]) -> torch.Tensor:
    linear = name.removesuffix(".weight")
    form = description.linears.get(linear)
    return reader.whole(name).float() if form is None else read_weight(reader, linear, form, *shape)


def _hook(linear: Any, form: LinearForm, reader: SafetensorsReader, name: str, device: torch.device | str) -> None:
    def optional(suffix: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        stored = f"{name}.{suffix}"
        return reader.whole(stored).float().reshape(shape).to(device) if stored in reader.names else None

    smooth = optional("pre_quant_scale", (-1,))
    scale = optional("input_scale", ())
    rounding: Callable[..., torch.Tensor] | None = ROUNDINGS[form.inputs] if form.inputs else None
    if smooth is None and rounding is None:
        return

    def feed(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values = arguments[0] if smooth is None else arguments[0] * smooth
        return (values if rounding is None else rounding(values, scale),)

    linear.register_forward_pre_hook(feed)


def _rounding_cache(config: Any, form: str, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        """Stores what a quantised cache gives back."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = scales[layer_idx]
            rounded = (ROUNDINGS[form](key_states, keys), ROUNDINGS[form](value_states, values))
            return super().update(*rounded, layer_idx, *args, **kwargs)

    return RoundingCache(config=config)
