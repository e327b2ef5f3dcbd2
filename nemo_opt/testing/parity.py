"""The parity oracle: a run on any layout must agree with the run of the whole model on one rank, tensor by tensor.

`require_parity(ranks, case)` is all that a test needs; the cases of quantisation, pruning and distillation are in `parity_cases`. A run is
reduced to a `Measurement` a rank: named numbers, and pieces of named tensors with their place in the whole one. `compare` holds every
piece of every rank, replicas included, against the reference. Decisions:
- A difference is measured against the largest entry of the whole reference tensor: entries far below it carry rounding noise only.
- A comparison that could not have failed is an error: an empty reference, a tensor that is all zero, pieces that leave a part unchecked.
- NaN differs from everything, itself included.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import nemo_opt._stack

import torch

from nemo_opt import parallel
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology

if TYPE_CHECKING:
    from nemo_opt.data.batches import Batch
    from nemo_opt.models.shards import Shard
    from nemo_opt.testing.ranks import RankPools

__all__ = [
    "TINY",
    "TINY_MOE",
    "Case",
    "Measurement",
    "ParityError",
    "Piece",
    "TokenSamples",
    "TrainingCase",
    "compare",
    "measure",
    "pieces_of",
    "require_parity",
]

TOL_REL = 1e-5
"""The project's goal for layouts in float32; the largest seen over tests/unit/testing/test_parity.py is 1.1e-6 (TE against local spec)."""

TINY = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=120, init_method_std=0.1
)
"""Small enough for a matrix of layouts in seconds; the large init gives every tensor a gradient well above rounding."""
TINY_MOE = TINY.with_(num_layers=2, num_moe_experts=4, moe_router_topk=2)
"""The same with four experts in every layer."""


class ParityError(AssertionError):
    """Two runs differ, or the comparison proves nothing. The message names the first tensor, where, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of one whole tensor, as one rank holds it."""

    key: str
    """Name of the whole tensor, the same on every layout."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where the rectangle begins in it."""
    tensor: torch.Tensor
    """The values, on the CPU."""

    @property
    def index(self) -> tuple[slice, ...]:
        """Selects the rectangle from the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.tensor.shape, strict=True))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one rank saw."""

    numbers: dict[str, float]
    """Named numbers that every rank must agree on, such as the loss."""
    pieces: list[Piece]
    """This rank's parts of the tensors."""


def compare(reference: Measurement, candidate: Sequence[Measurement], *, tol_rel: float = TOL_REL, name: str = "candidate") -> float:
    """Hold every number and every piece of every rank of `candidate` against `reference`, which holds whole tensors.

    Returns:
        The largest difference found, relative to the largest entry of its tensor.

    Raises:
        ParityError: Something differs by more than `tol_rel`, is missing, is not a number, or was never compared.

    """
    if not reference.numbers or not reference.pieces or not candidate:
        raise ParityError(f"{name}: nothing to compare ({len(reference.pieces)} reference tensors, {len(candidate)} ranks)")
    wholes = _wholes(reference)
    worst = 0.0
    for rank, measurement in enumerate(candidate):
        worst = max(worst, _compare_numbers(reference.numbers, measurement.numbers, tol_rel, f"{name}, rank {rank}"))
        for piece in measurement.pieces:
            worst = max(worst, _compare_piece(wholes, piece, tol_rel, f"{name}, rank {rank}"))
    _require_covered(wholes, [piece for measurement in candidate for piece in measurement.pieces], name)
    return worst


def _wholes(reference: Measurement) -> dict[str, torch.Tensor]:
    wholes = {}
    for piece in reference.pieces:
        if tuple(piece.tensor.shape) != piece.global_shape or piece.key in wholes:
            raise ParityError(f"the reference holds {piece.key} in parts: take it from a run on one rank")
        if not torch.isfinite(piece.tensor).all():
            raise ParityError(f"the reference of {piece.key} is not finite at {_position(~torch.isfinite(piece.tensor))}")
        if not piece.tensor.any():
            raise ParityError(f"the reference of {piece.key} is all zero: agreement with it proves nothing")
        wholes[piece.key] = piece.tensor
    return wholes


def _compare_numbers(reference: dict[str, float], candidate: dict[str, float], tol_rel: float, where: str) -> float:
    if missing := reference.keys() ^ candidate.keys():
        raise ParityError(f"{where}: {sorted(missing)} on one side only")
    worst = 0.0
    for key, expected in reference.items():
        difference = abs(candidate[key] - expected) / max(abs(expected), math.ulp(0.0))
        if not difference <= tol_rel:
            raise ParityError(f"{where}: {key} is {candidate[key]!r}, the reference {expected!r}: {difference:.3g} > {tol_rel:g} relative")
        worst = max(worst, difference)
    return worst


def _compare_piece(wholes: dict[str, torch.Tensor], piece: Piece, tol_rel: float, where: str) -> float:
    if piece.key not in wholes:
        raise ParityError(f"{where}: {piece.key} is not in the reference, which holds {len(wholes)} tensors")
    whole = wholes[piece.key]
    if tuple(whole.shape) != piece.global_shape:
        raise ParityError(f"{where}: {piece.key} has shape {piece.global_shape}, the reference {tuple(whole.shape)}")
    expected = whole[piece.index]
    if expected.shape != piece.tensor.shape:
        raise ParityError(f"{where}: {piece.key} at {piece.offset} with {tuple(piece.tensor.shape)} lies outside {piece.global_shape}")
    difference = (piece.tensor.double() - expected.double()).abs() / whole.double().abs().max()
    wrong = ~(difference <= tol_rel)  # NaN is wrong too
    if wrong.any():
        raise ParityError(_describe(piece, expected, difference, wrong, tol_rel, where))
    return float(difference.max()) if difference.numel() else 0.0


def _describe(piece: Piece, expected: torch.Tensor, difference: torch.Tensor, wrong: torch.Tensor, tol_rel: float, where: str) -> str:
    local = _position(wrong)
    position = tuple(start + i for start, i in zip(piece.offset, local, strict=True))
    largest = difference.nan_to_num(nan=math.inf).max().item()
    return (
        f"{where}: {piece.key} {piece.global_shape} differs first at {position}: {piece.tensor[local].item()!r}, "
        f"the reference {expected[local].item()!r}; {int(wrong.sum())} of {wrong.numel()} entries, "
        f"largest {largest:.3g} > {tol_rel:g} of the largest entry"
    )


def _position(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _require_covered(wholes: dict[str, torch.Tensor], pieces: Iterable[Piece], name: str) -> None:
    seen = {key: torch.zeros(whole.shape, dtype=torch.bool) for key, whole in wholes.items()}
    for piece in pieces:
        seen[piece.key][piece.index] = True
    if unseen := [key for key, mask in seen.items() if not mask.all()]:
        key = unseen[0]
        raise ParityError(f"{name}: no rank holds {key} at {_position(~seen[key])}; {len(unseen)} of {len(seen)} tensors are incomplete")


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A run that can be measured on any layout. It travels to the ranks: plain values only."""

    layout: str = "TP1PP1"
    """Name of the topology."""
    spec: Literal["te", "local"] = "local"
    """Layer spec."""

    @property
    def topology(self) -> Topology:
        """The layout, parsed."""
        return Topology.from_name(self.layout)

    @property
    def tol_rel(self) -> float:
        """What a layout may differ by, relative to the largest entry of a tensor."""
        return TOL_REL

    def at(self, layout: str, **changes: Any) -> Self:
        """The same on another layout."""
        return replace(self, layout=layout, **changes)

    @abstractmethod
    def measure(self) -> Measurement:
        """What this rank sees of the run; called on every rank of the layout."""


@dataclass(frozen=True, kw_only=True)
class TrainingCase(Case):
    """One forward and backward pass of a global batch: its loss, and the gradient of every parameter."""

    model: ModelConfig = TINY
    """Sizes."""
    seq_length: int = 16
    """Tokens of a sample."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    global_batch_size: int = 4
    """Samples over all ranks and micro-batches."""
    seed: int = 7
    """Of weights and tokens."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig."""

    def measure(self) -> Measurement:
        """Loss and the gradient of every parameter of one pass."""
        from nemo_opt.models.build import build_model
        from nemo_opt.training.optimizer import wrap, zero_gradients
        from nemo_opt.training.step import MegatronStep

        with parallel.parallel(self.topology, model=self.model) as topology:
            chunks = wrap(build_model(self.model, topology, spec=self.spec, seed=self.seed, **self.overrides))
            zero_gradients(chunks)
            step = MegatronStep(
                model=chunks,
                data_iterator=iter(case_batches(self, topology)),
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                num_microbatches=self.global_batch_size // (self.micro_batch_size * (topology.dp or 1)),
            )
            return Measurement(numbers=step(), pieces=gradient_pieces(chunks))


class TokenSamples:
    """A dataset of random tokens whose masks differ from sample to sample; the last but one has no valid token at all."""

    def __init__(self, size: int, seq_length: int, vocab_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(0, vocab_size, (size, seq_length + 1), generator=generator)
        self._loss_mask = (torch.rand(size, seq_length, generator=generator) < 0.7).float()
        self._loss_mask[size - 2 : size - 1] = 0.0

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self._tokens[index]
        positions = torch.arange(len(tokens) - 1)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": self._loss_mask[index], "position_ids": positions}


def case_batches(case: TrainingCase, topology: Topology) -> "list[Batch]":
    """The micro-batches of this rank."""
    from megatron.core import parallel_state

    from nemo_opt.data.batches import batches

    dataset = TokenSamples(case.global_batch_size, case.seq_length, case.model.vocab_size, case.seed)
    dp_rank = parallel_state.get_data_parallel_rank()
    return list(batches(dataset, micro_batch_size=case.micro_batch_size, dp_rank=dp_rank, dp_size=topology.dp or 1))  # type: ignore[arg-type]


def gradient_pieces(chunks: Sequence[Any]) -> list[Piece]:
    """Copies of this rank's gradients."""
    from nemo_opt.models.shards import parameter_shards

    return pieces_of(parameter_shards(chunks, of="grad"))


def pieces_of(shards: "Iterable[Shard]") -> list[Piece]:
    """Copies of what this rank holds."""
    return [
        Piece(key=shard.key, global_shape=shard.global_shape, offset=shard.offset, tensor=shard.tensor.detach().cpu().clone())
        for shard in shards
    ]


def require_parity(ranks: "RankPools", case: Case, *, reference: Measurement | None = None) -> float:
    """Run `case` on its layout and hold it against `reference`, or against the same case on one rank.

    Returns:
        The largest relative difference.

    Raises:
        ParityError: They differ.

    """
    if reference is None:
        [reference] = ranks(1).run(measure, case.at("TP1PP1"))
    measurements = ranks(case.topology.world_size).run(measure, case)
    return compare(reference, measurements, tol_rel=case.tol_rel, name=f"{type(case).__name__} {case.layout} ({case.spec})")


def measure(case: Case) -> Measurement:
    """`case.measure()`, as a function that ranks find by its name."""
    return case.measure()
