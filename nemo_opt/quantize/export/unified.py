"""Writing a quantised model as a Hugging Face directory, from any layout: codes, scales and a description that engines read.

Decisions:
- A weight is coded whole, as Megatron fuses it, on rank 0, and its rows then go to Hugging Face's weights: scales need no second rule, and
  files do not depend on the layout.
- What the directory holds is decided, and refused, before any weight is sent.
- Scales of rows that cross into another Hugging Face weight (two-dimensional blocks over the rows of several heads) are refused.
- `prove` runs before the directory gets its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nemo_opt._stack

import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import hf_weights
from nemo_opt.models.huggingface_config import config_to_hf, special_token_ids
from nemo_opt.models.huggingface_names import hf_pieces, hf_shapes
from nemo_opt.models.huggingface_writer import HuggingFaceWriter, write_directory
from nemo_opt.models.shards import GATE_SUFFIX, UP_SUFFIX, parameter_shards
from nemo_opt.models.sizes import model_config_of, unwrap
from nemo_opt.quantize.export.codes import Codes, code_weight, fp8_scale, int_scale
from nemo_opt.quantize.export.description import MODELOPT, Description, choose_method, describe
from nemo_opt.quantize.export.folding import Folding, fold
from nemo_opt.quantize.export.formats import Kind, LinearFormat, cache_format, linear_formats
from nemo_opt.quantize.export.packing import stored_tensors
from nemo_opt.quantize.tensors import QuantizerSettings, quantizer_settings, quantizer_tensors

__all__ = ["ExportPlan", "export_quantized_hf", "plan_export"]

_HALVES = (GATE_SUFFIX, UP_SUFFIX)
_NVFP4_RANGE = 6.0 * 448.0
_MAY_WRITE_SCALES = (Kind.INT4, Kind.W4A8)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """All that an export is, but the weights; only rank 0 has one, since only there are the tensors."""

    model: ModelConfig
    """Sizes."""
    formats: Mapping[str, LinearFormat]
    """Of the quantised linears by Megatron's name."""
    tensors: Mapping[str, torch.Tensor]
    """What quantization added (`quantizer_tensors`)."""
    folding: Folding
    """Where the `pre_quant_scale`s go."""
    method: str
    """Form of the export."""
    cache: str | None
    """Format of the KV cache."""
    dtype: torch.dtype
    """Of what is not quantised."""

    def describe(self) -> Description:
        """The JSON of the export."""
        quantized = {name: form for linear, form in self.formats.items() for name in self.linears(linear)}
        linears = [name.removesuffix(".weight") for name in hf_shapes(self.model) if "_proj." in name] + ["lm_head"]
        unquantized = [name for name in linears if name not in quantized]
        writes = bool(self.folding.written)
        return describe(quantized, self.method, unquantized=unquantized, cache=self.cache, writes_scales=writes)

    def linears(self, linear: str) -> list[str]:
        """Hugging Face's linears that hold rows of Megatron's."""
        suffixes = _HALVES if linear.endswith("linear_fc1") else ("",)
        names = [piece.name.removesuffix(".weight") for suffix in suffixes for piece in hf_pieces(f"{linear}.weight{suffix}", self.model)]
        return list(dict.fromkeys(names))

    def convert(self, key: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors stored for each Hugging Face weight that the Megatron weight `key` holds rows of."""
        linear, _, suffix = key.rpartition(".weight")
        if linear in self.formats and suffix in ("", *_HALVES):
            return self._quantized(linear, suffix, key, weight)
        return {name: {name: tensor} for name, tensor in hf_weights(key, self.unquantized(key, weight), self.model).items()}

    def unquantized(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight without codes as it is written: scaled by what was folded into it, then rounded to `dtype`."""
        factor = self.folding.norms.get(key, self.folding.rows.get(key))
        if factor is not None:
            weight = weight.float() * factor.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(self.dtype)

    def _quantized(self, linear: str, suffix: str, key: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        form = self.formats[linear]
        codes = self._codes(linear, suffix, weight)
        if (factor := self.folding.rows.get(key)) is not None:
            codes = replace(codes, scale=codes.scale * factor.unsqueeze(1))
        values = hf_weights(key, codes.values.view(torch.uint8), self.model)
        scales = self._split_scales(key, codes.scale, form)
        stored = {}
        for name, rows in values.items():
            part = Codes(values=rows.view(codes.values.dtype), scale=scales[name], scale_2=codes.scale_2)
            prefix = name.removesuffix(".weight")
            written = self.folding.written.get(linear)
            tensors = stored_tensors(prefix, part, form, self.method, input_scale=self._input_scale(linear, form), pre_quant_scale=written)
            stored[name] = tensors | self._cache_scale(prefix)
        return stored

    def _codes(self, linear: str, suffix: str, weight: torch.Tensor) -> Codes:
        first, second = (self._amax(f"{linear}.weight_quantizer{index}", suffix) for index in (".0", ".1"))
        amax = first if first is not None else self._amax(f"{linear}.weight_quantizer", suffix)
        return code_weight(weight, self.formats[linear], amax, second)

    def _amax(self, quantizer: str, suffix: str) -> torch.Tensor | None:
        """Of the rows that the weight with this suffix holds; one amax serves both halves of a gated MLP."""
        return self.tensors.get(f"{quantizer}._amax{suffix}", self.tensors.get(f"{quantizer}._amax"))

    def _split_scales(self, key: str, scale: torch.Tensor, form: LinearFormat) -> dict[str, torch.Tensor]:
        if scale.dim() == 0:
            return {piece.name: scale.clone() for piece in hf_pieces(key, self.model)}
        rows = form.block[0]
        parts = hf_weights(key, scale.view(torch.uint8).repeat_interleave(rows, 0) if rows > 1 else scale.view(torch.uint8), self.model)
        return {name: part[::rows].contiguous().view(scale.dtype) for name, part in parts.items()}

    def _input_scale(self, linear: str, form: LinearFormat) -> torch.Tensor | None:
        amax = self.tensors.get(f"{linear}.input_quantizer._amax")
        if not form.quantizes_inputs or form.kind is Kind.MXFP8:
            return None
        assert amax is not None, "checked by plan_export"
        if form.kind is Kind.NVFP4:
            return amax.float().reshape(()) / _NVFP4_RANGE
        return int_scale(amax, 127).reshape(()) if form.kind is Kind.INT8 else fp8_scale(amax).reshape(())

    def _cache_scale(self, prefix: str) -> dict[str, torch.Tensor]:
        """`k_scale` beside the key's projection, `v_scale` beside the value's; compressed-tensors has them one level up."""
        attention, _, projection = prefix.rpartition(".")
        if self.cache is None or projection not in ("k_proj", "v_proj"):
            return {}
        layer = attention.removeprefix("model.layers.").removesuffix(".self_attn")
        amax = self.tensors[f"decoder.layers.{layer}.self_attention.core_attention.{projection[0]}_bmm_quantizer._amax"].reshape(())
        scale = fp8_scale(amax) if self.cache == "fp8" else amax.float() / _NVFP4_RANGE
        if self.method == MODELOPT:
            return {f"{prefix}.{projection[0]}_scale": scale}
        return {f"{attention}.{projection[0]}_scale": scale.reshape(1)}


def plan_export(
    model: ModelConfig, settings: Mapping[str, QuantizerSettings], tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype
) -> ExportPlan:
    """Decides what an export of a quantised model holds.

    Args:
        model: Sizes.
        settings: Of the enabled quantizers (`quantizer_settings`).
        tensors: What quantization added, whole (`quantizer_tensors`).
        dtype: Of what is not quantised.

    Raises:
        ConfigError: No form of export can hold the model; names what is in the way, and the alternative.

    """
    formats, cache = linear_formats(settings), cache_format(settings)
    if not formats:
        raise ConfigError("no weight of the model is quantised: use export_hf of nemo_opt.models")
    for linear, form in formats.items():
        _check_rows(linear, form, model)
    _check_calibrated(formats, tensors)
    folding = fold(tensors, formats, model, quantizes_cache=cache is not None)
    for linear, reason in folding.reasons.items():
        if linear not in formats or formats[linear].kind not in _MAY_WRITE_SCALES:
            kind = formats[linear].kind if linear in formats else "no format"
            raise ConfigError(f"the scale before {linear} cannot be folded, since {reason}, and {kind} has no place for it: use nemo")
    method = choose_method(formats, writes_scales=bool(folding.written), cache=cache)
    return ExportPlan(model=model, formats=formats, tensors=tensors, folding=folding, method=method, cache=cache, dtype=dtype)


def export_quantized_hf(
    chunks: Sequence[torch.nn.Module],
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 2 * 10**9,
    overwrite: bool = False,
    prove: Callable[[Path, ExportPlan | None], None] | None = None,
) -> Path:
    """Writes a quantised model as a directory that inference engines load. Collective: call it on every rank.

    Args:
        chunks: This rank's chunks of a model that was quantised and calibrated, at any layout.
        out_dir: Must not exist, or be empty.
        tokenizer_dir: Its files are copied, and its special tokens named in `config.json`.
        dtype: Of what is not quantised; None keeps the model's.
        max_file_bytes: Of a file of weights.
        overwrite: Replace an older Hugging Face directory, once the new one is whole.
        prove: Called on every rank with the directory before it has its name, and with the plan on rank 0; what it raises removes the
            directory.

    Raises:
        ConfigError: No form of export can hold the model; names what is in the way, and the alternative.
        CheckpointError: `out_dir` is not empty, cannot be written, or was proven wrong. Raised on every rank.

    """
    config, settings = model_config_of(chunks), quantizer_settings(chunks)
    stored = dtype or unwrap(chunks[0]).config.params_dtype
    tensors = {key: tensor for key, tensor in quantizer_tensors(chunks) if tensor is not None}
    plan: ExportPlan | None = None

    def begin() -> HuggingFaceWriter:
        nonlocal plan
        tokens = special_token_ids(tokenizer_dir) if tokenizer_dir is not None else None
        hf_config = config_to_hf(config, dtype=str(stored).removeprefix("torch."), special_tokens=tokens)
        plan = plan_export(config, settings, tensors, dtype=stored)
        said = plan.describe()
        documents = {"config.json": hf_config | {"quantization_config": said.quantization_config}, **said.documents}
        options = {"tokenizer_dir": tokenizer_dir, "max_file_bytes": max_file_bytes, "overwrite": overwrite}
        return HuggingFaceWriter(Path(out_dir), documents, list(hf_shapes(config)), **options)  # type: ignore[arg-type]

    def convert(key: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        assert plan is not None
        return plan.convert(key, weight)

    check = None if prove is None else lambda directory: prove(directory, plan)
    write_directory(parameter_shards(chunks), begin, convert, prove=check)
    return Path(out_dir)


def _check_calibrated(formats: Mapping[str, LinearFormat], tensors: Mapping[str, torch.Tensor]) -> None:
    for linear, form in formats.items():
        quantizers = [] if form.kind is Kind.MXFP8 else ["weight_quantizer"] + ["input_quantizer"] * form.quantizes_inputs
        for quantizer in quantizers:
            if not any(key.startswith(f"{linear}.{quantizer}.") and "._amax" in key for key in tensors):
                raise ConfigError(f"{linear}.{quantizer} has no amax: calibrate before exporting")


def _check_rows(linear: str, form: LinearFormat, model: ModelConfig) -> None:
    suffixes = _HALVES if linear.endswith("linear_fc1") else ("",)
    for piece in (piece for suffix in suffixes for piece in hf_pieces(f"{linear}.weight{suffix}", model)):
        if piece.row % form.block[0] or piece.num_rows % form.block[0]:
            raise ConfigError(
                f"blocks of {form.block[0]} rows do not divide the {piece.num_rows} rows of {linear} that are {piece.name}: choose "
                f"fp8_block_shape with a divisor of the head dimension {model.head_dim}"
            )
        if form.kind in _MAY_WRITE_SCALES and piece.num_rows % 2:
            raise ConfigError(f"{piece.name} has {piece.num_rows} rows in a row, and two rows of INT4 share a byte")
