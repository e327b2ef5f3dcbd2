"""The calibration loop: a forward pass over batches on any layout, in which nothing but real tokens is measured.

Decisions: documents that share a row do not attend to each other (`nemo_opt.training.forward`), padding enters no statistic
(`nemo_opt.quantize.masking`), the output layer is left out where no quantizer looks at it, and maxima are collected in one pass over each
activation and none over weights that are known (`nemo_opt.quantize.maxima`).
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.models.sizes import unwrap
from nemo_opt.quantize.masking import padding_masked
from nemo_opt.quantize.maxima import quick_maxima
from nemo_opt.training.forward import Batch, ForwardLoop, forward_loop

__all__ = ["CalibrationLoop", "CalibrationReport", "calibration_loop"]


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What calibration has seen, over all ranks, and how long it took."""

    samples: int
    """Rows with at least one real token."""
    tokens: int
    """Real tokens of one pass."""
    padding: int
    """Other tokens of one pass: padding, and rows repeated to keep ranks even."""
    passes: int
    """Passes over the data; ModelOpt's searches make several."""
    time_s: float
    """Time of all passes on this rank."""

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second; 0 before the first pass."""
        return self.tokens * self.passes / self.time_s if self.time_s else 0.0

    def __str__(self) -> str:
        """One line for a person."""
        seen = f"{self.samples} samples, {self.tokens} tokens, {self.padding} of padding"
        return f"{seen}, {self.passes} passes in {self.time_s:.1f} s: {self.tokens_per_s:.0f} tokens/s"


class CalibrationLoop:
    """A forward loop for ModelOpt that keeps count; made by `calibration_loop`."""

    def __init__(self, batches: list[Batch], samples: int, tokens: int, padding: int) -> None:
        self._counts = {"samples": samples, "tokens": tokens, "padding": padding}
        self._loops = {skip: _loop(batches, skip_head=skip) for skip in (False, True)}
        self._passes, self._time_s = 0, 0.0

    def __call__(self, model: torch.nn.Module) -> None:
        """Shows all batches to the model; collective."""
        start = time.perf_counter()
        with quick_maxima(model):
            self._loops[_head_is_unseen(model)](model)
        self._time_s += time.perf_counter() - start
        self._passes += 1

    @property
    def report(self) -> CalibrationReport:
        """Up to now."""
        return CalibrationReport(**self._counts, passes=self._passes, time_s=self._time_s)


def calibration_loop(batches: Iterable[Batch]) -> CalibrationLoop:
    """What `Quantizer.quantize` takes as forward_loop, over this data-parallel rank's micro-batches; collective.

    Args:
        batches: as `nemo_opt.data.calibration_batches` makes them, or any with tokens and position_ids.

    Raises:
        DataError: on every rank, if any rank has no batch or ranks of one data-parallel rank disagree.

    """
    kept = list(batches)
    samples, tokens, padding = _counts_of_all(kept)
    return CalibrationLoop(kept, samples, tokens, padding)


def _loop(batches: list[Batch], *, skip_head: bool) -> ForwardLoop:
    return forward_loop(batches, description="calibrating", surround=padding_masked, skip_head=skip_head)


def _head_is_unseen(model: torch.nn.Module) -> bool:
    """Whether the output layer has no enabled quantizer; said of each stage for itself."""
    head = getattr(unwrap(model), "output_layer", None)
    return head is not None and not any(isinstance(module, TensorQuantizer) and module.is_enabled for module in head.modules())


def _counts_of_all(batches: list[Batch]) -> tuple[int, int, int]:
    """(samples, tokens, padding) over all ranks, each sequence counted once however it is spread."""
    rows = tokens = padding = 0
    for batch in batches:
        counted = _counted(batch)
        rows += int(counted.any(dim=1).sum())
        tokens += int(counted.sum())
        padding += int((~counted).sum())
    everyone: list[tuple[int, int, int]] = [(0, 0, 0)] * dist.get_world_size()
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
    # the first context-parallel rank holds the first token of every row
    rows = rows if parallel_state.get_context_parallel_rank() == 0 else 0
    dist.all_gather_object(everyone, (rows, tokens, padding) if is_first else (0, 0, 0))
    rows, tokens, padding = (sum(column) for column in zip(*everyone, strict=True))
    return rows, tokens, padding


def _counted(batch: Batch) -> torch.Tensor:
    """[B, S], True for tokens that statistics count."""
    mask, tokens = batch.get("attention_mask"), batch["tokens"]
    assert tokens is not None
    return mask.bool() if mask is not None and mask.dim() == 2 else torch.ones_like(tokens, dtype=torch.bool)
