"""Importance of channels, heads, groups, layers and experts: measured on any layout, saved independently of it.

The definitions are those of the Minitron paper (arXiv 2407.14679) as ModelOpt computes them (`mcore_minitron.py`, the functions
`_register_*_importance`). With a_bsc the activation of channel c at position s of sample b, and m_bc its mean |a_bsc| over s:
- score of a channel: sqrt(sum_b m_bc^2). For ffn: the input of linear_fc2. For hidden: the sum of this score over the outputs of both norms
  of all layers. For a head: the L2 norm of the scores of its channels in the input of linear_proj; for a query group: that of its heads.
- score of a layer (block influence): the sum over micro-batches of the mean over tokens of 1 - cos(its input, its output).
- score of an expert: the mean over its tokens of the L2 norm of its output, weighted by the router. Score of an expert's ffn channel: the
  mean of |activation| over its tokens. (ModelOpt takes sqrt(sum of m^2) here too, over micro-batches; which tokens make up one depends
  on the layout, so that score would too. For one micro-batch both are the same. ModelOpt also lets grouped experts share one score.)

Ranks exchange sums, never weights: over data parallel ranks sums are added, over tensor and expert parallel ranks put side by side, over
pipeline stages collected. All ranks end with the same scores, to the bit.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.collective import on_first
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.build import model_config_of, unwrap
from nemo_opt.models.config import ModelConfig
from nemo_opt.prune.activations import LayerActivations, recorded_layers
from nemo_opt.prune.digest import weights_digest
from nemo_opt.prune.scores_file import read_scores_file, write_scores_file

__all__ = ["ImportanceScores", "measure_importance"]

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "num_moe_experts")
_PER_LAYER = ("ffn", "heads", "groups", "experts")


@dataclass(frozen=True, kw_only=True)
class ImportanceScores:
    """Scores of a whole model, the higher the more important; float64 on the CPU. Layers are numbered from 1."""

    hidden: torch.Tensor
    """[H], of the channels of the residual stream."""
    ffn: dict[int, torch.Tensor]
    """By layer: [F], of the channels inside the MLP; [experts, F] in a mixture of experts."""
    heads: dict[int, torch.Tensor]
    """By layer: [query heads]."""
    groups: dict[int, torch.Tensor]
    """By layer: [query groups]."""
    layers: torch.Tensor
    """[L], block influence."""
    model: ModelConfig
    """Sizes of the model that was measured."""
    tokens: int
    """Tokens that were shown to it, over all data-parallel ranks."""
    digest: str
    """Of its weights, the same at every layout and layer spec."""
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer: [experts]; empty for a dense model."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; collective, rank 0 writes. An older file is replaced."""
        tensors = {"hidden": self.hidden, "layers": self.layers}
        for name in _PER_LAYER:
            tensors |= {f"{name}.{number}": tensor for number, tensor in getattr(self, name).items()}
        facts = {"model": self.model.to_dict(), "tokens": self.tokens, "digest": self.digest}
        on_first(lambda: write_scores_file(Path(path), tensors, facts))

    @classmethod
    def load(cls, path: str | Path, *, model: ModelConfig | None = None) -> "ImportanceScores":
        """Read what `save` wrote; collective, rank 0 reads.

        Args:
            path: the file.
            model: sizes of the model to be pruned; None checks nothing.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
            ConfigError: the scores belong to a model of other sizes; names both.

        """
        tensors, facts = on_first(lambda: read_scores_file(Path(path)))
        per_layer: dict[str, dict[int, torch.Tensor]] = {name: {} for name in _PER_LAYER}
        for key, tensor in tensors.items():
            name, _, number = key.partition(".")
            if number:
                per_layer[name][int(number)] = tensor
        sizes = ModelConfig.from_dict(facts["model"])
        scores = cls(
            hidden=tensors["hidden"], layers=tensors["layers"], model=sizes, tokens=facts["tokens"], digest=facts["digest"], **per_layer
        )
        if model is not None:
            scores.check_model(model, source=os.fspath(path))
        return scores

    def check_model(self, model: ModelConfig, *, source: str = "the scores") -> None:
        """Raise `ConfigError` unless the scores belong to a model of these sizes."""
        if wrong := [name for name in _SIZES if getattr(self.model, name) != getattr(model, name)]:
            theirs, ours = ({name: getattr(sizes, name) for name in wrong} for sizes in (self.model, model))
            raise ConfigError(f"{source} were measured on a model with {theirs}, this one has {ours}: measure this model's importance")


def measure_importance(model: Any, forward_loop: Callable[[torch.nn.Module], None]) -> ImportanceScores:
    """Show data to a model and return its scores, the same on every rank; collective. The definitions are this module's docstring.

    Args:
        model: a GPTModel, wrapped (DDP, Float16Module) or not, or a list that holds one, on any layout without virtual stages.
        forward_loop: called with the unwrapped model, in evaluation mode and without gradients; runs its forward passes.

    Raises:
        DataError: the loop has shown the model nothing.

    """
    gpt_model = unwrap(model)
    sizes = model_config_of(gpt_model)
    digest = weights_digest(gpt_model)
    was_training = gpt_model.training
    gpt_model.eval()
    try:
        with torch.no_grad(), recorded_layers(gpt_model) as records:
            forward_loop(gpt_model)
    finally:
        gpt_model.train(was_training)
    layers = _over_stages(records, sizes)
    return _broadcast(_scores(layers, sizes, digest))


_Layer = dict[str, Any]
"""The whole layer's scores, by name: norms (two of [H]), ffn, heads, groups, experts, influence, tokens."""


def _over_stages(records: dict[int, LayerActivations], model: ModelConfig) -> dict[int, _Layer]:
    """The scores of all layers, on every rank."""
    shown: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shown, [number for number, record in records.items() if not record.tokens])
    if silent := sorted({number for numbers in shown for number in numbers}):
        raise DataError(f"layers {silent} have seen no data: the forward loop must run the model's forward pass on every rank")
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * group.size()
    dist.all_gather_object(stages, {number: _whole_layer(record, model) for number, record in records.items()}, group=group)
    return dict(sorted((number, layer) for stage in stages for number, layer in stage.items()))


def _whole_layer(record: LayerActivations, model: ModelConfig) -> _Layer:
    """Put together what data, tensor and expert parallel ranks have of one layer."""
    tp, dp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    heads = _side_by_side(_sum_over(record.heads, dp), tp).view(model.num_attention_heads, -1).sum(dim=1).cpu()
    influence = _tensor(record.influence)
    influence, tokens = _sum_over(torch.stack([influence, torch.full_like(influence, record.tokens)]), dp).tolist()
    layer: _Layer = {
        "norms": [_sum_over(norm, dp).sqrt().cpu() for norm in record.norms],
        "heads": heads.sqrt(),
        "groups": heads.view(model.num_query_groups, -1).sum(dim=1).sqrt(),
        "influence": influence,
        "tokens": round(tokens),
    }
    if model.num_moe_experts is None:
        return layer | {"ffn": _side_by_side(_sum_over(record.ffn, dp), tp).sqrt().cpu()}
    return layer | _whole_experts(record)


def _whole_experts(record: LayerActivations) -> _Layer:
    dp, ep = parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_model_parallel_group()
    tokens = _sum_over(record.expert_tokens, dp).clamp(min=1)  # an expert that no token reached scores zero
    ffn = _side_by_side(_sum_over(record.ffn, dp) / tokens[:, None], parallel_state.get_expert_tensor_parallel_group(), dim=1)
    experts = _sum_over(record.experts, dp) / tokens
    return {"ffn": _side_by_side(ffn, ep).cpu(), "experts": _side_by_side(experts, ep).cpu()}


def _scores(layers: dict[int, _Layer], model: ModelConfig, digest: str) -> ImportanceScores:
    return ImportanceScores(
        hidden=torch.stack([norm for layer in layers.values() for norm in layer["norms"]]).sum(dim=0),
        layers=torch.tensor([layer["influence"] for layer in layers.values()], dtype=torch.float64),
        model=model,
        tokens=max(layer["tokens"] for layer in layers.values()),
        digest=digest,
        **{name: {number: layer[name] for number, layer in layers.items() if name in layer} for name in _PER_LAYER},
    )


def _broadcast(scores: ImportanceScores) -> ImportanceScores:
    """Rank 0's scores: ranks add the same numbers, but not necessarily in the same order."""
    holder = [scores]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _sum_over(tensor: torch.Tensor | None, group: Any) -> torch.Tensor:
    total = _tensor(tensor).clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def _side_by_side(tensor: torch.Tensor, group: Any, *, dim: int = 0) -> torch.Tensor:
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _tensor(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a layer that has seen tokens has all its sums"
    return tensor
