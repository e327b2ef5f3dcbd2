"""Oracles of pruning that share no code with it: importance by plain hooks on a dense single-rank model, weights sliced by hand.

Models are made whose parts differ in importance, and whole weights are collected from any layout.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_opt.models.build import Spec, build_model, model_config_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.shards import gather_full, parameter_shards
from nemo_opt.parallel import Topology, current_topology, initialize

__all__ = ["DenseOracle", "HandKept", "batches", "contrasted_model", "hand_sliced", "logits", "marks", "whole_weights"]

Batches = list[dict[str, torch.Tensor]]
SEQ_LENGTH = 16


def batches(*, count: int = 3, micro_batch_size: int = 2, vocab_size: int = 128) -> Batches:
    """Of `count` fixed micro-batches those of this data-parallel rank; of each sequence the two slices of its context-parallel rank."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, vocab_size, (micro_batch_size, SEQ_LENGTH), generator=generator) for _ in range(count)]
    mine = tokens[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    places = _places_of_this_rank()
    return [{"tokens": t[:, places], "position_ids": places.expand(micro_batch_size, -1)} for t in mine]


def _places_of_this_rank() -> torch.Tensor:
    """Of 2 cp slices, rank r has the r-th and the r-th from the end, so that causal attention costs all ranks the same."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return torch.arange(SEQ_LENGTH)
    slices = torch.arange(SEQ_LENGTH).chunk(2 * size)
    return torch.cat([slices[rank], slices[2 * size - 1 - rank]])


def contrasted_model(topology: Topology, config: ModelConfig, spec: Spec, **overrides: Any) -> list[Any]:
    """A model whose channels, heads and layers matter differently: a fresh one's are alike, and the choice would be rounding's."""
    if current_topology() is None:
        initialize(topology)
    chunks = build_model(config, topology, spec=spec, seed=5, **overrides)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                if parameter.dim() == 1:
                    order = torch.randperm(parameter.numel(), generator=_generator(name))
                    parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel())[order])
                else:
                    parameter.mul_(5.0)
    return list(chunks)


def _generator(name: str) -> torch.Generator:
    """The same for a norm of either layer spec, and of all layers."""
    kind = "final" if "final" in name else "mlp" if "mlp" in name else "attention"
    return torch.Generator().manual_seed(len(kind))


def logits(chunks: Sequence[Any], shown: Batches) -> torch.Tensor:
    """Logits [micro-batches * B, S, V] on every rank, through mcore's schedule; shards of the vocabulary are put together."""
    collected: list[torch.Tensor] = []

    def collect(output: torch.Tensor) -> Any:
        collected.append(output)
        return output.new_zeros(()), {}

    def step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        return model(batch["tokens"], batch["position_ids"], None), collect

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(shown),
            model=list(chunks),
            num_microbatches=len(shown),
            seq_length=shown[0]["tokens"].shape[1] * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=shown[0]["tokens"].shape[0],
            forward_only=True,
        )
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, (parallel_state.get_tensor_model_parallel_rank(), torch.cat(collected) if collected else None))
    first = {rank: shard for rank, shard in reversed(shards) if shard is not None}
    return torch.cat([first[rank] for rank in sorted(first)], dim=-1)


def whole_weights(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """All weights by their layout-independent key, on rank 0; checks that replicas agree to the bit."""
    shards = parameter_shards(chunks)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {(s.key, s.offset): s.tensor.clone() for s in shards})
    seen: dict[Any, torch.Tensor] = {}
    for held in everyone:
        for place, tensor in held.items():
            assert torch.equal(seen.setdefault(place, tensor), tensor), place
    return gather_full(shards)


def marks(model: Any) -> dict[str, tuple[bool, dict[str, Any]]]:
    """What training reads from parameters beside their values, by name without the layer."""
    plain = (bool, int, str)
    return {
        re.sub(r"layers\.\d+", "layers", name): (p.requires_grad, {k: v for k, v in vars(p).items() if isinstance(v, plain)})
        for name, p in model.named_parameters()
    }


@dataclass(frozen=True)
class HandKept:
    """What the oracle keeps; layers and all else counted from 0. Heads are lists by kept group of indices inside that group."""

    layers: list[int]
    hidden: list[int]
    ffn: dict[int, list[int]]
    groups: dict[int, list[int]]
    heads: dict[int, list[list[int]]]


class DenseOracle:
    """Importance by hooks on a dense model of either spec on one rank: over the batch the L2 norm of mean |activation|."""

    def __init__(self, model: Any, shown: Batches) -> None:
        self._sizes = model_config_of(model)
        self.hidden = torch.zeros(self._sizes.hidden_size)
        self.ffn: dict[int, torch.Tensor] = {}
        self.heads: dict[int, torch.Tensor] = {}
        self.layers: dict[int, float] = {}
        self._squares: dict[Any, torch.Tensor] = {}
        hooks = [hook for number, layer in enumerate(model.decoder.layers) for hook in self._hooks(number, layer)]
        logits([model], shown)
        for hook in hooks:
            hook.remove()
        for (number, kind), square in self._squares.items():
            if kind == "fc2":
                self.ffn[number] = square.sqrt()
            elif kind == "proj":
                self.heads[number] = square.view(self._sizes.num_attention_heads, -1).sum(dim=1).sqrt()
            else:
                self.hidden += square.sqrt()

    def _hooks(self, number: int, layer: Any) -> list[Any]:
        attention, mlp = layer.self_attention, layer.mlp
        inputs = [(mlp.linear_fc2, "fc2"), (attention.linear_proj, "proj")]
        if hasattr(attention.linear_qkv, "layer_norm_weight"):
            normed = [
                linear.register_forward_pre_hook(self._fused((number, kind)))
                for linear, kind in ((attention.linear_qkv, "qkv"), (mlp.linear_fc1, "fc1"))
            ]
        else:
            normed = []
            inputs += [(attention.linear_qkv, "qkv"), (mlp.linear_fc1, "fc1")]
        plain = [linear.register_forward_pre_hook(lambda _, args, key=(number, kind): self._add(key, args[0])) for linear, kind in inputs]
        return [*normed, *plain, layer.register_forward_hook(self._change(number), with_kwargs=True)]

    def _add(self, key: Any, x: torch.Tensor) -> None:
        self._squares[key] = self._squares.get(key, torch.zeros(())) + x.abs().mean(dim=0).pow(2).sum(dim=0)

    def _fused(self, key: Any) -> Any:
        def hook(linear: Any, args: Any) -> None:
            x = args[0]
            self._add(key, x / (x.pow(2).mean(dim=-1, keepdim=True) + self._sizes.norm_epsilon).sqrt() * linear.layer_norm_weight)

        return hook

    def _change(self, number: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before, after = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]
            cosine = (before * after).sum(dim=-1) / before.norm(dim=-1) / after.norm(dim=-1)
            self.layers[number] = self.layers.get(number, 0.0) + float(1 - cosine.mean())

        return hook

    def kept(self, targets: Mapping[str, int]) -> HandKept:
        """What stays for `targets`; a size that is not named stays."""
        sizes = {**self._sizes.to_dict(), **targets}
        old_groups, groups = self._sizes.num_query_groups, sizes["num_query_groups"]
        layers = sorted(sorted(self.layers, key=lambda n: -self.layers[n])[: sizes["num_layers"]])
        kept_groups, kept_heads = {}, {}
        for n in layers:
            by_group = self.heads[n].view(old_groups, -1)
            kept_groups[n] = _best(by_group.norm(dim=1), groups)
            kept_heads[n] = [_best(by_group[g], sizes["num_attention_heads"] // groups) for g in kept_groups[n]]
        ffn = {n: _best(self.ffn[n], sizes["ffn_hidden_size"]) for n in layers}
        return HandKept(layers, _best(self.hidden, sizes["hidden_size"]), ffn, kept_groups, kept_heads)


def _best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda index: -float(scores[index]))[:count])


def hand_sliced(weights: Mapping[str, torch.Tensor], kept: HandKept, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The whole weights of a dense model after slicing, by key; `weights` as `whole_weights` gives them, `config` the sizes before."""
    d, groups = config.head_dim, config.num_query_groups
    per_group = config.num_attention_heads // groups
    h = torch.tensor(kept.hidden)
    small = {key: weights[key][:, h] for key in ("embedding.word_embeddings.weight", "output_layer.weight") if key in weights}
    small["decoder.final_layernorm.weight"] = weights["decoder.final_layernorm.weight"][h]
    for new, old in enumerate(kept.layers):
        source = {key.removeprefix(f"decoder.layers.{old}."): w for key, w in weights.items() if key.startswith(f"decoder.layers.{old}.")}
        qkv = source["self_attention.linear_qkv.weight"].view(groups, per_group + 2, d, -1)[..., h]
        proj = source["self_attention.linear_proj.weight"].view(-1, groups, per_group, d)[h]
        chosen = list(zip(kept.groups[old], kept.heads[old], strict=True))
        ffn = torch.tensor(kept.ffn[old])
        cut = {
            "self_attention.linear_qkv.weight": torch.cat(
                [torch.cat([qkv[g, heads], qkv[g, per_group:]]).reshape(-1, len(h)) for g, heads in chosen]
            ),
            "self_attention.linear_proj.weight": torch.cat([proj[:, g, heads].reshape(len(h), -1) for g, heads in chosen], dim=1),
            "mlp.linear_fc1.weight_w": source["mlp.linear_fc1.weight_w"][ffn][:, h],
            "mlp.linear_fc1.weight_v": source["mlp.linear_fc1.weight_v"][ffn][:, h],
            "mlp.linear_fc2.weight": source["mlp.linear_fc2.weight"][:, ffn][h],
            "mlp.linear_fc1.layer_norm_weight": source["mlp.linear_fc1.layer_norm_weight"][h],
            "self_attention.linear_qkv.layer_norm_weight": source["self_attention.linear_qkv.layer_norm_weight"][h],
        }
        small |= {f"decoder.layers.{new}.{name}": tensor for name, tensor in cut.items()}
    return small
