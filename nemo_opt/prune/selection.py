"""Which layers, channels, heads, groups and experts stay: pure functions of scores and targets.

The rule is ModelOpt's at equal settings: the highest scores stay, hidden channels alike in all layers, ffn channels and experts in each
layer for itself, heads in each query group for itself. Query groups, which ModelOpt no longer prunes, go first: those with the highest
scores stay, then the best heads of each. What stays keeps its order; of equal scores the lower index stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_opt.models.config import ModelConfig
from nemo_opt.prune.importance import ImportanceScores

__all__ = ["Kept", "KeptLayer", "keep_layers", "select"]


@dataclass(frozen=True, kw_only=True)
class KeptLayer:
    """What stays of one layer: indices into the old one, from 0, ascending."""

    heads: Sequence[int]
    """Query heads, over all groups."""
    groups: Sequence[int]
    """Query groups; each keeps equally many heads."""
    ffn: Sequence[Sequence[int]]
    """Channels inside the MLP; of each old expert in a mixture of experts, else of the one MLP."""
    experts: Sequence[int] | None = None
    """Experts; None in a dense layer."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a model."""

    hidden: Sequence[int]
    """Channels of the residual stream, from 0, ascending."""
    layers: Mapping[int, KeptLayer]
    """The layers that stay, by their old number from 1, ascending."""


def select(scores: ImportanceScores, targets: Mapping[str, int]) -> Kept:
    """What stays to reach `targets` (sizes by their name in `ModelConfig`, already found valid for the model)."""
    model = scores.model
    numbers = [index + 1 for index in _top(scores.layers, targets.get("num_layers"))]
    return Kept(
        hidden=_top(scores.hidden, targets.get("hidden_size")),
        layers={number: _select_layer(scores, number, model, targets) for number in numbers},
    )


def keep_layers(model: ModelConfig, drop: Sequence[int]) -> Kept:
    """All of the model but the layers `drop`, counted from 1."""
    layer = KeptLayer(
        heads=range(model.num_attention_heads),
        groups=range(model.num_query_groups),
        ffn=[range(model.ffn_hidden_size)] * (model.num_moe_experts or 1),
        experts=None if model.num_moe_experts is None else range(model.num_moe_experts),
    )
    stay = [number for number in range(1, model.num_layers + 1) if number not in drop]
    return Kept(hidden=range(model.hidden_size), layers=dict.fromkeys(stay, layer))


def _select_layer(scores: ImportanceScores, number: int, model: ModelConfig, targets: Mapping[str, int]) -> KeptLayer:
    groups = _top(scores.groups[number], targets.get("num_query_groups"))
    heads_per_group = model.num_attention_heads // model.num_query_groups
    heads_left = targets.get("num_attention_heads", len(groups) * heads_per_group) // len(groups)
    by_group = scores.heads[number].view(model.num_query_groups, heads_per_group)
    ffn = scores.ffn[number].view(-1, model.ffn_hidden_size)
    return KeptLayer(
        groups=groups,
        heads=[group * heads_per_group + head for group in groups for head in _top(by_group[group], heads_left)],
        ffn=[_top(channels, targets.get("ffn_hidden_size")) for channels in ffn],
        experts=None if model.num_moe_experts is None else _top(scores.experts[number], targets.get("num_moe_experts")),
    )


def _top(scores: torch.Tensor, count: int | None) -> Sequence[int]:
    """Indices of the `count` highest scores, ascending; all for None."""
    if count is None or count == scores.numel():
        return range(scores.numel())
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
