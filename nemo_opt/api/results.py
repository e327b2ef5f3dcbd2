"""What each command has done, in numbers: the return values of `nemo_opt.api`, which also cross from rank 0 to the launching process.

Losses are mean cross-entropies in nats a token over the same validation batches; None means that none was measured. Loads no torch.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "DistillResult",
    "EvalResult",
    "ExportResult",
    "ImportResult",
    "PruneResult",
    "PtqResult",
    "RecipeResult",
    "Result",
    "SweepResult",
    "SweepRun",
    "TrainResult",
]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every command reports."""

    path: str
    """Where the result lies (for an evaluation: what was read)."""
    layout: str
    """Name of the topology, such as TP2PP1."""
    spec: str
    """Layer spec: "te" or "local"; "transformers" where no Megatron model was made."""
    device: str
    """Device and backend, such as cpu/gloo."""
    parameters: int
    """Parameters of the result, over all ranks."""
    time_s: float
    """Wall-clock seconds, without start-up."""

    def __fspath__(self) -> str:
        return self.path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainResult(Result):
    """A training run."""

    steps: int
    """Optimizer steps taken in all, those before a resume included."""
    loss_first: float
    """Training loss of this run's first step."""
    loss_last: float
    """Training loss of this run's last step."""
    loss_after: float | None
    """Validation loss at the end."""
    loss_uniform: float
    """ln(vocabulary): the loss of knowing nothing."""
    tokens_per_s: float
    """Training tokens a second over all ranks."""
    peak_memory_bytes: int | None = None
    """The most that any rank held during the training: allocated on a GPU, resident in main memory without one."""
    resumable: str | None = None
    """Checkpoint from which training can go on; None where none is left."""


@dataclass(frozen=True, kw_only=True)
class RecipeResult(Result):
    """A search for mixed precision; nothing was quantised."""

    effective_bits: float
    """Bits a weight of the layers' linears on average; block scales are left out, as in the budget."""
    budget_bits: float
    """What was allowed."""
    formats: dict[str, int]
    """Linears of each format; "none" stays unquantised."""
    format_of: dict[str, str]
    """Format of each linear by name."""


@dataclass(frozen=True, kw_only=True)
class PtqResult(Result):
    """A post-training quantisation."""

    algorithm: str | None
    """Name of the algorithm; None left the model as it was."""
    export_format: str
    """Form of the result."""
    loss_before: float | None
    """Validation loss of the source."""
    loss_after: float | None
    """Validation loss of the quantised model."""
    quantizers: int
    """Quantizers that are enabled, over all ranks of one model copy."""
    bytes_before: int
    """Bytes of the source directory."""
    bytes_after: int | None
    """Bytes of the result directory; None where nothing was written."""
    block: str = ""
    """Weights that share a scale, such as 128 or 128x128; empty without blocks."""
    bits_per_weight: float | None = None
    """Bits of a quantised weight in the exported form, scales included; None where none is quantised."""
    bits_per_parameter: float | None = None
    """The same of all parameters, with 16 for those that are not quantised."""
    calibration: dict[str, Any] | None = None
    """Samples, tokens, padding, passes, time_s and tokens_per_s of the calibration; None where none was needed."""
    sqnr: dict[str, Any] = field(default_factory=dict)
    """Of `weights` and of `activations`: median and worst SQNR in decibels and the worst one's name, where any was measured."""
    quantizer_facts: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Of each quantizer by its global name: sqnr_db, amax and, of weights, bits."""
    proof: dict[str, Any] | None = None
    """What a reader of the exported files found; None where the format has no proof, or nothing was written."""
    samples: dict[str, str] = field(default_factory=dict)
    """Continuations by prompt, where they were asked for."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One algorithm of a sweep: a result, or an error."""

    result: PtqResult | None = None
    """What it has come to."""
    error: str | None = None
    """Why there is no result."""


@dataclass(frozen=True, kw_only=True)
class SweepResult(Result):
    """The same model quantised by several algorithms."""

    checkpoint: str
    """The model."""
    loss_before: float | None
    """Its validation loss."""
    bytes_before: int
    """Bytes of its directory."""
    runs: dict[str, SweepRun]
    """By algorithm, in the order they were asked for."""

    @property
    def failed(self) -> list[str]:
        """Algorithms without a result."""
        return [name for name, run in self.runs.items() if run.result is None]


@dataclass(frozen=True, kw_only=True)
class PruneResult(Result):
    """A pruning."""

    loss_before: float | None
    """Validation loss of the source."""
    loss_after: float | None
    """Validation loss of the pruned model, before any training."""
    parameters_before: int
    """Parameters of the source."""
    model_before: dict[str, Any]
    """Sizes of the source (`ModelConfig.to_dict`)."""
    model_after: dict[str, Any]
    """Sizes of the result."""
    kept_layers: list[int] = field(default_factory=list)
    """The layers that stayed, by their old numbers from 1."""
    importance_tokens: int | None = None
    """Tokens that importance was measured on; None where layers were dropped by number."""
    search: dict[str, Any] | None = None
    """Limits of a search, how many architectures are within them, and the candidates that were scored; None without one."""


@dataclass(frozen=True, kw_only=True)
class DistillResult(Result):
    """A distillation. First and last of the distillation losses are those of this run's steps."""

    steps: int
    """Optimizer steps taken in all, those before a resume included."""
    resumed_at: int = 0
    """How many of them were taken before this run."""
    teacher: str
    """The teacher's checkpoint."""
    teacher_loss: float | None
    """Validation loss of the teacher."""
    loss_before: float | None
    """Validation loss of the student before this run."""
    loss_after: float | None
    """Validation loss of the student after."""
    validation_losses: dict[str, float] = field(default_factory=dict)
    """Validation losses of the student on the way, by step."""
    kd_loss_first: float
    """What was minimised, in the first step."""
    kd_loss_last: float
    """And in the last step."""
    logits_loss_first: float | None = None
    """The part that compares next-token distributions, in the first step."""
    logits_loss_last: float | None = None
    """And in the last step."""
    intermediate_loss_first: float | None = None
    """The part that compares hidden states, in the first step; 0 where none are compared."""
    intermediate_loss_last: float | None = None
    """And in the last step."""
    lm_loss_first: float | None = None
    """The language model's loss, in the first step; None where it does not count."""
    lm_loss_last: float | None = None
    """And in the last step."""
    tokens_per_s: float
    """Training tokens a second over all ranks."""
    peak_memory_bytes: int | None = None
    """The most that any rank held during the training: allocated on a GPU, resident in main memory without one."""
    resumable: str | None = None
    """Checkpoint from which the distillation can go on; None where none is left."""


@dataclass(frozen=True, kw_only=True)
class ImportResult(Result):
    """A Hugging Face directory turned into a checkpoint."""

    source: str
    """The Hugging Face directory."""
    bytes_after: int
    """Bytes of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """A checkpoint turned into a Hugging Face directory."""

    source: str
    """The checkpoint."""
    bytes_after: int
    """Bytes of the directory."""


@dataclass(frozen=True, kw_only=True)
class EvalResult(Result):
    """A validation loss."""

    loss: float
    """Nats a token."""
    tokens: int
    """Tokens it was measured on."""
    bytes: int | None = None
    """Bytes of a Hugging Face directory."""
    formats: dict[str, int] = field(default_factory=dict)
    """Linears of each format, of a quantised Hugging Face directory."""
    bits_per_weight: float | None = None
    """Bits in its files for a quantised weight, scales included."""
    bits_per_parameter: float | None = None
    """Bits in its files for any parameter."""
