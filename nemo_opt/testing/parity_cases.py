"""What the parity oracle compares beside training: quantisation, pruning, distillation. Each is a `Case` for `require_parity`.

Decisions:
- Quantisation is compared by what it leaves in the model, pruning by what it keeps and by the weights that remain, not by losses: these
  hardly move when two channels change places.
- What is kept is compared as masks over the old sizes, by the old layer's number: a layer too early shows as one that must not be there.
- Where layouts must agree to the bit, the tolerance is 0.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import nemo_opt._stack

import torch
from megatron.core import parallel_state

from nemo_opt import parallel
from nemo_opt.data.batches import cp_slice
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.convert import convert_to_distillation_model
from nemo_opt.distill.losses import distillation_loss_fn
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.shards import parameter_shards, quantizer_shards
from nemo_opt.parallel import Topology
from nemo_opt.prune.importance import measure_importance
from nemo_opt.prune.pruner import prune_language_model
from nemo_opt.prune.selection import Kept, select
from nemo_opt.quantize.calibration import calibration_loop
from nemo_opt.quantize.config import ExportConfig
from nemo_opt.quantize.quantizer import Quantizer
from nemo_opt.quantize.tensors import quantizer_settings
from nemo_opt.testing import pruning, quantized
from nemo_opt.testing.parity import TINY, Case, Measurement, Piece, TrainingCase, case_batches, gradient_pieces, pieces_of
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.forward import forward_loop
from nemo_opt.training.loop import TrainingRun

__all__ = ["DistillationCase", "PruningCase", "QuantizationCase", "distillation_model", "kept_pieces", "projection_pieces"]

_SEARCHED = ("int4_awq", "int8_sq", "w4a8_awq")
_GROUPED = TINY.with_(num_attention_heads=8, num_query_groups=4)
_LARGER = TINY.with_(num_layers=8, hidden_size=48, ffn_hidden_size=64)
_PAIRED = DistillationConfig(intermediate_layer_pairs=(("decoder.final_layernorm", "decoder.final_layernorm"),))


@dataclass(frozen=True, kw_only=True)
class QuantizationCase(Case):
    """A calibration: amax and pre_quant_scale of every quantizer, and how many there are."""

    algorithm: str = "fp8"
    """Name of the algorithm."""
    model: ModelConfig = quantized.SMALL
    """Sizes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `QuantizationConfig`."""
    seed: int = 5
    """Of the weights."""

    @property
    def tol_rel(self) -> float:
        """Twice the largest seen over tests/unit/testing/test_parity_cases.py, 2.6e-7 at TP2PP2; a search may amplify it (3.2e-7 seen)."""
        return 1e-5 if self.algorithm in _SEARCHED else 5e-7

    def measure(self) -> Measurement:
        """Calibrates on four micro-batches, of which each data-parallel rank sees its own."""
        with parallel.parallel(self.topology, model=self.model) as topology:
            chunks = build_model(self.model, topology, spec=self.spec, seed=self.seed)
            mine = quantized.labelled_batches(4, vocab_size=self.model.vocab_size)[
                parallel_state.get_data_parallel_rank() :: topology.dp or 1
            ]
            export = ExportConfig(path="unused", export_format="nemo")
            quantizer = Quantizer(quantized.quantization(self.algorithm, **self.settings), export)
            with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints a table of all quantizers
                quantizer.quantize(chunks, calibration_loop([cp_slice(batch) for batch in mine]))
            numbers = {"enabled quantizers": float(len(quantizer_settings(chunks)))}
            return Measurement(numbers=numbers, pieces=pieces_of(quantizer_shards(chunks)))


@dataclass(frozen=True, kw_only=True)
class PruningCase(Case):
    """A pruning to sizes: kept indices of every axis and layer, and every weight that remains."""

    model: ModelConfig = _GROUPED
    """Sizes before."""
    targets: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 20, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 2}
    )
    """Sizes after, by their name in `ModelConfig`."""

    @property
    def tol_rel(self) -> float:
        """Scores differ by 1.7e-7 between layouts, the model's parts by far more: the choice is the same, and weights are only moved."""
        return 0.0

    def measure(self) -> Measurement:
        """Measures importance on four micro-batches, chooses and slices."""
        with parallel.parallel(self.topology, model=self.model) as topology:
            chunks = pruning.contrasted_model(topology, self.model, self.spec)
            scores = measure_importance(
                chunks, forward_loop(pruning.batches(count=4, vocab_size=self.model.vocab_size), description="parity")
            )
            kept = kept_pieces(select(scores, self.targets), self.model)
            prune_language_model(chunks, {f"target_{name}": size for name, size in self.targets.items()}, scores=scores)
            return Measurement(numbers={"tokens": float(scores.tokens)}, pieces=[*kept, *pieces_of(parameter_shards(chunks))])


def kept_pieces(kept: Kept, model: ModelConfig) -> list[Piece]:
    """Masks of what stays, over the sizes of `model`: 1 for each index that does. Layers count from 1, as in a pruning's own words."""
    pieces = [_mask("kept.hidden", kept.hidden, model.hidden_size), _mask("kept.layers", [n - 1 for n in kept.layers], model.num_layers)]
    for number, layer in kept.layers.items():
        name = f"kept.layer{number}"
        pieces.append(_mask(f"{name}.groups", layer.groups, model.num_query_groups))
        pieces.append(_mask(f"{name}.heads", layer.heads, model.num_attention_heads))
        pieces += [_mask(f"{name}.ffn{expert}", channels, model.ffn_hidden_size) for expert, channels in enumerate(layer.ffn)]
        if layer.experts is not None and model.num_moe_experts is not None:
            pieces.append(_mask(f"{name}.experts", layer.experts, model.num_moe_experts))
    return pieces


def _mask(key: str, indices: Sequence[int], size: int) -> Piece:
    mask = torch.zeros(size)
    mask[list(indices)] = 1.0
    return Piece(key=key, global_shape=(size,), offset=(0,), tensor=mask)


@dataclass(frozen=True, kw_only=True)
class DistillationCase(TrainingCase):
    """A few steps of distillation: every number of each, and of the first the gradients of the student and of the projections."""

    micro_batch_size: int = 2
    global_batch_size: int = 8
    teacher: ModelConfig = _LARGER
    """Sizes of the teacher."""
    teacher_seed: int = 11
    """Of the teacher's weights."""
    settings: DistillationConfig = _PAIRED
    """What is learnt."""
    steps: int = 1
    """Optimizer steps."""
    first_stage_layers: int | None = None
    """Layers of each model on the first stage; None for as many as on the others."""

    @property
    def topology(self) -> Topology:
        """The layout, with the first stage's size."""
        return replace(super().topology, first_stage_layers=self.first_stage_layers)

    def measure(self) -> Measurement:
        """Trains; the norm of the gradient is compared, so it is not clipped."""
        with parallel.parallel(self.topology, model=self.teacher) as topology:
            config = TrainingConfig(
                max_steps=self.steps,
                clip_grad=0.0,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.global_batch_size,
            )
            chunks = distillation_model(self, topology)
            run = TrainingRun(chunks=chunks, config=config, topology=topology, loss_fn=distillation_loss_fn)
            numbers: dict[str, float] = {}
            pieces: list[Piece] = []
            for step in range(1, self.steps + 1):
                metrics = run.step(iter(case_batches(self, topology)))
                numbers |= {f"{name} of step {step}": value for name, value in metrics.items()}
                pieces = pieces or [*gradient_pieces(run.chunks), *projection_pieces(run.chunks)]
            return Measurement(numbers=numbers, pieces=pieces)


def distillation_model(case: DistillationCase, topology: Topology) -> list[Any]:
    """Student with its teacher, as the chunks of this rank."""
    student = build_model(case.model, topology, spec=case.spec, seed=case.seed)
    teacher = build_model(case.teacher, topology, spec=case.spec, seed=case.teacher_seed)
    return list(convert_to_distillation_model(student, teacher, case.settings))


def projection_pieces(chunks: Sequence[Any]) -> list[Piece]:
    """Gradients of what brings the student's hidden states to the teacher's width; none where both are as wide."""
    return [
        Piece(key=name, global_shape=tuple(parameter.shape), offset=(0,) * parameter.dim(), tensor=parameter.main_grad.clone())
        for name, parameter in chunks[0].named_parameters()
        if "_loss_modules" in name
    ]
