"""Proof that what was written computes what the model in memory does: an export read back by `quantize.reader`, a checkpoint restored.

Four comparisons, on rank 0, against the model at whatever layout it lives:
- every weight, dequantised, with the fake-quantised one in memory, `weight_error` = the largest |written - memory| / |memory| of a weight
  (2-norms). A scale in the wrong place shows here, however little it moves the outputs.
- every scale of inputs, keys and values with the amax in memory, `scale_error`. Doubled, one of E4M3 moves the outputs by hardly anything.
- logits of validation batches, `logit_error` = |written - memory| / |memory| (2-norms over a batch, the largest of all batches).
- the validation loss on these batches, `loss_difference` in nats.

What is not quantised is compared as it was written: for the pass it is rounded in memory as in the files, and put back. What remains is
arithmetic in another order, and inputs that lie so close to a rounding edge that this puts them on the other side; `_BOUNDS` says how much.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
from megatron.core.utils import get_model_config

from nemo_opt.checkpoint import atomic
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.collective import on_each, on_first
from nemo_opt.errors import CheckpointError, NemoOptError
from nemo_opt.models.build import spec_of
from nemo_opt.models.huggingface import hf_weights
from nemo_opt.models.shards import Shard, full_tensors, parameter_shards, quantizer_shards
from nemo_opt.parallel import Topology
from nemo_opt.quantize.export.formats import Kind
from nemo_opt.quantize.export.unified import ExportPlan
from nemo_opt.quantize.reader.model import ExportedModel, open_export
from nemo_opt.quantize.reader.rounding import STATIC
from nemo_opt.quantize.sqnr import quantized_weights
from nemo_opt.quantize.tensors import quantizer_settings
from nemo_opt.training.logits import gather_logits
from nemo_opt.training.losses import Batch

__all__ = ["ProofReport", "prove_checkpoint", "prove_export", "random_batches"]


@dataclass(frozen=True, kw_only=True)
class ProofReport:
    """What a proof found, and the bounds it held to."""

    tokens: int
    """Tokens that were compared."""
    weight_error: float
    """Largest relative error of a weight."""
    scale_error: float
    """Largest relative error of a scale of inputs, keys or values."""
    logit_error: float
    """Relative error of the logits."""
    loss_difference: float
    """Loss of what was written minus that in memory, nats a token."""
    weight_bound: float
    """Largest `weight_error` allowed."""
    scale_bound: float
    """Largest `scale_error` allowed."""
    logit_bound: float
    """Largest `logit_error` allowed."""
    loss_bound: float
    """Largest size of `loss_difference` allowed."""


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    weight: float
    scale: float
    logit: float
    loss: float


_SMALLEST_AMAX = 2.0**-24  # below, ModelOpt rounds to zero, and a scale means nothing
_OUTSIDE_LAYERS = ("embedding.", "output_layer.", "decoder.final_layernorm.")
_EXACT = _Bounds(weight=0.0, scale=0.0, logit=0.0, loss=0.0)


def prove_export(directory: str | Path, chunks: list[Any], plan: ExportPlan | None, batches: Sequence[Batch]) -> ProofReport:
    """Proves a quantised Hugging Face directory. Collective.

    Args:
        directory: What was written, complete.
        chunks: This rank's chunks of the model that it was written from.
        plan: What `export_quantized_hf` hands to its `prove`: on rank 0 the plan of the export.
        batches: Validation batches, the same on every rank: tokens, position_ids, labels and loss_mask, each [B, S].

    Returns:
        What was found, equal on every rank.

    Raises:
        CheckpointError: On every rank: the directory cannot be read, or computes something else; says what differs, and by how much.

    """
    exported: ExportedModel | None = None

    def read() -> tuple[_Rounding, _Bounds]:
        nonlocal exported
        assert plan is not None
        exported = open_export(directory)
        rounding = _Rounding(dtype=plan.dtype, linears=frozenset(plan.formats), factors={**plan.folding.norms, **plan.folding.rows})
        return rounding, _bounds(plan, get_model_config(chunks[0]).params_dtype)

    rounding, bounds = on_first(read)
    errors = _weight_error(chunks, exported, plan), _scale_error(chunks, exported, plan)
    with _rounded_as_written(chunks, rounding):
        in_memory = [gather_logits(chunks, batch) for batch in batches]

    def compare() -> ProofReport:
        assert exported is not None
        written = [exported.logits(_of(batch, "tokens").cpu(), _of(batch, "position_ids").cpu()) for batch in batches]
        return _report(directory, errors, written, in_memory, batches, bounds)

    return on_first(compare)


def prove_checkpoint(path: str | Path, chunks: list[Any], topology: Topology, batches: Sequence[Batch]) -> ProofReport:
    """Proves a sharded checkpoint: restored at the same layout, it must hold the same weights and amax and give the same logits, exactly.

    The checkpoint is removed where it does not. Collective.

    Args:
        path: The checkpoint.
        chunks: This rank's chunks of the model that was saved.
        topology: Their layout.
        batches: As in `prove_export`.

    Raises:
        CheckpointError: On every rank: it cannot be restored, or something differs; says what.

    """
    try:
        restored, _ = restore_model(path, topology, spec=spec_of(chunks[0]), dtype=get_model_config(chunks[0]).params_dtype)
        on_each(lambda: _same_tensors(path, chunks, restored))
        if quantizer_settings(chunks) != quantizer_settings(restored):
            raise CheckpointError(f"{path} is wrong: its quantizers have other settings than the model in memory")
        pairs = [(gather_logits(restored, batch), gather_logits(chunks, batch)) for batch in batches]
        written, in_memory = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return on_first(lambda: _report(path, (0.0, 0.0), written, in_memory, batches, _EXACT))
    except NemoOptError:
        on_first(lambda: atomic.discard(Path(path)))
        raise


def random_batches(vocab_size: int, seq_length: int, *, count: int = 2, rows: int = 4, seed: int = 1) -> list[Batch]:
    """Random tokens to compare two models on where there is no text: the same on every rank.

    Args:
        vocab_size: Tokens to draw from.
        seq_length: S.
        count: Batches.
        rows: B.
        seed: Of the draw.

    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, vocab_size, (rows, seq_length + 1), generator=generator) for _ in range(count)]
    return [
        {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, seq_length),
            "position_ids": torch.arange(seq_length).expand(rows, seq_length).contiguous(),
            "attention_mask": None,
        }
        for tokens in drawn
    ]


# ---------------------------------------------------------------------------------------------------------------------- bounds

_WEIGHT_ERROR = 1e-6
"""Seen: 7.2e-8, from the reciprocals of integers' scales."""
_SAME_ORDER = 1e-5
"""Of logits, where nothing but weights is rounded. Seen: 1.6e-7."""
_INPUTS = {Kind.FP8: 3e-3, Kind.MXFP8: 3e-3, Kind.INT8: 5e-3, Kind.W4A8: 1e-2, Kind.NVFP4: 2e-2}
"""Of logits, where inputs are rounded too: about ten times what was seen, which is 2.3e-4, 2.5e-4, 5.0e-4, 9.1e-4 and 2.2e-3."""
_CACHE = {"fp8": 1e-3, "nvfp4": 2e-2}
"""Of logits, where keys and values are rounded. Seen: 6.7e-5 and 1.7e-3."""
_LOSS_TO_LOGITS = 0.1
"""Seen: losses differ by up to 4.4e-5 nats where logits do by 5.0e-4, and by 6.1e-5 where these do by 2.2e-3."""
_HALF_WEIGHT_ERROR = {Kind.W4A8: 5e-2}
"""Of weights in 16 bits, where they differ from others: W4A8 rounds its first stage to them, and then again. Seen: 1.6e-2."""
_HALF_LOGIT_ERROR = 5e-2
"""Added for a model in 16 bits, whose logits are compared with float32's. Seen: 2.4e-3 (INT4) to 3.0e-2 (NVFP4)."""
# All seen on the trained tiny Llama (4 layers, hidden size 128, 1.1 M parameters), in five seeds (of calibration and validation samples):
# in float32 at TP1PP1, TP2PP1 and TP1PP2, written in float32 and in bfloat16; in bfloat16 at TP1PP1. 1024 tokens each, on CPU.


def _bounds(plan: ExportPlan, dtype: torch.dtype) -> _Bounds:
    inputs = [_INPUTS[form.kind] for form in plan.formats.values() if form.quantizes_inputs]
    logit = max([_SAME_ORDER, *inputs, *([_CACHE[plan.cache]] if plan.cache else [])])
    weight = _WEIGHT_ERROR
    if dtype != torch.float32:
        weight = max(_HALF_WEIGHT_ERROR.get(form.kind, _WEIGHT_ERROR) for form in plan.formats.values())
        logit += _HALF_LOGIT_ERROR
    return _Bounds(weight=weight, scale=_WEIGHT_ERROR, logit=logit, loss=_LOSS_TO_LOGITS * logit)


# ------------------------------------------------------------------------------------------------------------------ comparisons


def _report(
    path: str | Path,
    errors: tuple[float, float],
    written: Sequence[torch.Tensor | None],
    in_memory: Sequence[torch.Tensor | None],
    batches: Sequence[Batch],
    bounds: _Bounds,
) -> ProofReport:
    pairs = [(w, m) for w, m in zip(written, in_memory, strict=True) if w is not None and m is not None]
    losses = [_loss([logits for logits in side if logits is not None], batches) for side in (written, in_memory)]
    report = ProofReport(
        tokens=sum(_of(batch, "tokens").numel() for batch in batches),
        weight_error=errors[0],
        scale_error=errors[1],
        logit_error=max((_relative(w.cpu(), m) for w, m in pairs), default=0.0),
        loss_difference=losses[0] - losses[1],
        weight_bound=bounds.weight,
        scale_bound=bounds.scale,
        logit_bound=bounds.logit,
        loss_bound=bounds.loss,
    )
    found = [
        f"{name} {value:.3g}, at most {bound:.3g} is explained by rounding"
        for name, value, bound in (
            ("an error of weights of", report.weight_error, bounds.weight),
            ("an error of scales of", report.scale_error, bounds.scale),
            ("an error of logits of", report.logit_error, bounds.logit),
            ("a difference in loss of", abs(report.loss_difference), bounds.loss),
        )
        if not value <= bound  # NaN fails
    ]
    if found:
        raise CheckpointError(f"{path} is not the model in memory: {'; '.join(found)}. It was removed; the model is untouched")
    return report


def _relative(written: torch.Tensor, memory: torch.Tensor) -> float:
    size = memory.double().norm()
    error = (written.double() - memory.double()).norm()
    return float(error / size) if size > 0 else float(error)


def _loss(logits: Sequence[torch.Tensor], batches: Sequence[Batch]) -> float:
    total = count = 0.0
    for logits_BSV, batch in zip(logits, batches, strict=True):
        labels, mask = _of(batch, "labels").cpu().flatten(), _of(batch, "loss_mask").cpu().flatten().double()
        losses = torch.nn.functional.cross_entropy(logits_BSV.cpu().double().flatten(0, 1), labels, reduction="none")
        total += float((losses * mask).sum())
        count += float(mask.sum())
    return total / count if count else 0.0


def _of(batch: Batch, name: str) -> torch.Tensor:
    value = batch[name]
    assert value is not None, f"a batch without {name}"
    return value


def _same_tensors(path: str | Path, chunks: list[Any], restored: list[Any]) -> None:
    for shards in (parameter_shards, quantizer_shards):
        mine, theirs = ({(shard.key, shard.offset): shard.tensor for shard in shards(model)} for model in (chunks, restored))
        if mine.keys() != theirs.keys():
            raise CheckpointError(f"{path} is wrong: it holds other tensors, {sorted(mine.keys() ^ theirs.keys())[:4]}")
        for name, tensor in mine.items():
            if not torch.equal(tensor, theirs[name]):
                raise CheckpointError(f"{path} is wrong: {name[0]} differs from the model in memory")


# ----------------------------------------------------------------------------------------------------- the model, as it was written


@dataclass(frozen=True, kw_only=True)
class _Rounding:
    """What export does to weights that are not quantised."""

    dtype: torch.dtype
    linears: frozenset[str]
    factors: Mapping[str, torch.Tensor]

    def __call__(self, shard: Shard) -> torch.Tensor:
        """The value in memory that gives the written one: rounded after the multiplication with what was folded in, and divided again."""
        factor = self.factors.get(shard.key)
        if factor is None:
            return shard.tensor.to(self.dtype).to(shard.tensor)
        mine = factor[shard.index[0]].to(shard.tensor.device).reshape(-1, *[1] * (shard.tensor.dim() - 1))
        return ((shard.tensor.float() * mine).to(self.dtype).float() / mine).to(shard.tensor)


@contextmanager
def _rounded_as_written(chunks: list[Any], rounding: _Rounding) -> Iterator[None]:
    shards = [shard for shard in parameter_shards(chunks) if shard.key.rpartition(".weight")[0] not in rounding.linears]
    kept = [shard.tensor.clone() for shard in shards]
    try:
        with torch.no_grad():
            for shard in shards:
                shard.tensor.copy_(rounding(shard))
        yield
    finally:
        with torch.no_grad():
            for shard, tensor in zip(shards, kept, strict=True):
                shard.tensor.copy_(tensor)


def _weight_error(chunks: list[Any], exported: ExportedModel | None, plan: ExportPlan | None) -> float:
    """The largest relative error of a weight on rank 0, layer by layer; 0 elsewhere. Collective."""
    errors = [0.0]
    layers = [f"decoder.layers.{layer}." for layer in range(get_model_config(chunks[0]).num_layers)]
    shards = parameter_shards(chunks)  # views, which see what is written below
    for prefix in (*layers, None):
        with _fake_quantized(chunks, prefix):
            for key, memory in full_tensors([shard for shard in shards if shard.key.startswith(prefix or _OUTSIDE_LAYERS)]):
                if memory is not None and exported is not None and plan is not None:
                    errors += _errors(key, memory, exported, plan)
    return max(errors)


def _errors(key: str, memory: torch.Tensor, exported: ExportedModel, plan: ExportPlan) -> Iterator[float]:
    """Of the Hugging Face weights that hold rows of a Megatron weight, each in the model's own precision."""
    is_quantized = key.rpartition(".weight")[0] in plan.formats and not key.endswith("layer_norm_weight")
    factor = plan.folding.rows.get(key) if is_quantized else None
    factors = None if factor is None else hf_weights(key, factor, plan.model)
    for name, rows in hf_weights(key, memory if is_quantized else plan.unquantized(key, memory), plan.model).items():
        written = exported.model.get_parameter(name).detach().cpu()
        unfolded = written if factors is None else written / factors[name].unsqueeze(1)
        yield _relative(unfolded.to(rows.dtype), rows)


def _scale_error(chunks: list[Any], exported: ExportedModel | None, plan: ExportPlan | None) -> float:
    """The largest relative error of a scale that is not a weight's, on rank 0; 0 elsewhere. Collective."""
    errors = [0.0]
    for key, amax in full_tensors([shard for shard in quantizer_shards(chunks) if _is_of_inputs(shard.key)]):
        if amax is not None and exported is not None and plan is not None and (size := float(amax)) > _SMALLEST_AMAX:
            errors += [abs(largest / size - 1) for largest in _largest_inputs(key, exported, plan)]
    return max(errors)


def _is_of_inputs(key: str) -> bool:
    return key.endswith("._amax") and ".weight_quantizer" not in key


def _largest_inputs(key: str, exported: ExportedModel, plan: ExportPlan) -> Iterator[float]:
    """What stands for the amax `key` in the files: a scale times the largest code."""
    name, _, quantizer = key.removesuffix("._amax").rpartition(".")
    if quantizer == "input_quantizer" and name in plan.formats:
        for linear in plan.linears(name):
            if linear in exported.input_scales:
                yield exported.input_scales[linear] * STATIC[str(exported.description.linears[linear].inputs)]
    elif exported.cache_scales is not None and exported.description.cache is not None:
        pair = exported.cache_scales[int(name.split(".")[2])]
        yield float(pair[quantizer == "v_bmm_quantizer"]) * STATIC[exported.description.cache]


@contextmanager
def _fake_quantized(chunks: list[Any], prefix: str | None) -> Iterator[None]:
    """The quantised weights of a layer hold what the fake quantisation makes of them; they are put back at the end."""
    weights = [(weight, quantizer) for name, weight, quantizer in quantized_weights(chunks) if prefix and name.startswith(prefix)]
    kept = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, quantizer in weights:
                weight.copy_(quantizer(weight))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), tensor in zip(weights, kept, strict=True):
                weight.copy_(tensor)
