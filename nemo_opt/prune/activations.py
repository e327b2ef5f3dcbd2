"""What one pipeline stage's layers show while data passes: sums of activations, taken by plain forward hooks on either layer spec.

Decisions:
- The mean over the sequence is squared, so it must be that of the whole sequence: the hook sums it over the ranks that share the sequence
  (context parallel; sequence parallel too, between the tensor-parallel regions). What is linear waits for one sum at the end.
- Sums are float64: their rounding is then far below that of the activations, and no layout decides which of two channels is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from nemo_opt.models.norms import on_norm_output

__all__ = ["LayerActivations", "recorded_layers"]


class LayerActivations:
    """Sums over micro-batches of one layer, on this rank; the attributes are None until data has passed."""

    def __init__(self) -> None:
        self.norms: list[torch.Tensor | None] = [None, None]
        """Of the outputs of the two norms, [H] each: over samples, the squared mean |activation| over the sequence."""
        self.heads: torch.Tensor | None = None
        """The same of the attention's output before its projection, [channels of this rank's heads]."""
        self.ffn: torch.Tensor | None = None
        """The same of the MLP's inner activations, [F of this rank]; of experts the plain sum over tokens, [experts of this rank, F]."""
        self.experts: torch.Tensor | None = None
        """Of the outputs of this rank's experts, the sum of L2 norms over tokens, [experts of this rank]."""
        self.expert_tokens: torch.Tensor | None = None
        """Tokens that reached each of this rank's experts."""
        self.influence: torch.Tensor | None = None
        """Over micro-batches, the mean of 1 - cos(input, output) over tokens."""
        self.tokens = 0
        """Tokens of this data-parallel rank that have passed."""

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add to one of the sums."""
        before = getattr(self, name)
        setattr(self, name, value if before is None else before + value)


@contextmanager
def recorded_layers(gpt_model: Any) -> Iterator[dict[int, LayerActivations]]:
    """Hooks on all layers of this stage for the duration of the block; yields their records by layer number, from 1."""
    records: dict[int, LayerActivations] = {}
    handles: list[Any] = []
    try:
        for layer in gpt_model.decoder.layers:
            records[layer.layer_number] = record = LayerActivations()
            handles += _hooks(layer, record)
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: Any, record: LayerActivations) -> list[Any]:
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    sequence = _sequence_group(config)
    handles = [
        _norm_hook(layer.input_layernorm, attention.linear_qkv, record, 0, sequence),
        _norm_hook(layer.pre_mlp_layernorm, getattr(mlp, "linear_fc1", None), record, 1, sequence),
        attention.linear_proj.register_forward_pre_hook(_input_hook(record, "heads")),
        layer.register_forward_hook(_influence_hook(record, sequence), with_kwargs=True),
    ]
    if isinstance(mlp, MoELayer):
        return handles + _expert_hooks(mlp.experts, record)
    return [*handles, mlp.linear_fc2.register_forward_pre_hook(_input_hook(record, "ffn"))]


def _sequence_group(config: Any) -> Any:
    """The ranks that share a sequence between the tensor-parallel regions."""
    if config.sequence_parallel:
        return parallel_state.get_tensor_and_context_parallel_group()
    return parallel_state.get_context_parallel_group()


def _summed(value: torch.Tensor, group: Any) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


def _squared_means(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[C]: over samples, the squared mean of |x|, [S, B, C], over the whole sequence, of which this rank has S positions."""
    total_BC = _summed(x.detach().abs().sum(dim=0, dtype=torch.float64), group)
    return (total_BC / (x.shape[0] * group.size())).pow(2).sum(dim=0)


def _norm_hook(norm: Any, fused_linear: Any, record: LayerActivations, index: int, group: Any) -> Any:
    def add(output: torch.Tensor) -> None:
        value, before = _squared_means(output, group), record.norms[index]
        record.norms[index] = value if before is None else before + value

    return on_norm_output(norm, fused_linear, add)


def _input_hook(record: LayerActivations, name: str) -> Any:
    """Inside a tensor-parallel region the sequence is whole but for context parallelism."""
    group = parallel_state.get_context_parallel_group()
    return lambda _module, args: record.add(name, _squared_means(args[0], group))


def _influence_hook(record: LayerActivations, group: Any) -> Any:
    def hook(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_SBH = kwargs["hidden_states"].detach().float()  # Megatron-Core's decoder passes it by name
        cosine_SB = torch.nn.functional.cosine_similarity(before_SBH, output[0].detach().float(), dim=-1)
        change = _summed((1 - cosine_SB).sum(dtype=torch.float64), group)
        tokens = cosine_SB.numel() * group.size()
        record.add("influence", change / tokens)
        record.tokens += tokens

    return hook


def _expert_hooks(experts: Any, record: LayerActivations) -> list[Any]:
    handles = [experts.register_forward_hook(_expert_output_hook(record))]
    if hasattr(experts, "local_experts"):
        for index, expert in enumerate(experts.local_experts):
            handles.append(expert.linear_fc2.register_forward_pre_hook(_one_expert_hook(record, index, len(experts.local_experts))))
    else:
        handles.append(experts.linear_fc2.register_forward_pre_hook(_grouped_experts_hook(record)))
    return handles


def _expert_output_hook(record: LayerActivations) -> Any:
    """Tensor-parallel ranks see the same tokens and hold summands of each output."""
    group = parallel_state.get_expert_tensor_parallel_group()

    def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
        per_expert = args[1].tolist()
        output_TH = _summed(output[0].detach().float().clone(), group)
        norms_T = torch.linalg.vector_norm(output_TH, dim=-1).double()
        record.add("experts", torch.stack([part.sum() for part in norms_T[: sum(per_expert)].split(per_expert)]))
        record.add("expert_tokens", torch.tensor(per_expert, dtype=torch.float64, device=output_TH.device))

    return hook


def _one_expert_hook(record: LayerActivations, index: int, num_experts: int) -> Any:
    def hook(_module: Any, args: tuple[Any, ...]) -> None:
        total_F = args[0].detach().abs().sum(dim=0, dtype=torch.float64)
        total_EF = total_F.new_zeros(num_experts, total_F.shape[0])
        total_EF[index] = total_F
        record.add("ffn", total_EF)

    return hook


def _grouped_experts_hook(record: LayerActivations) -> Any:
    def hook(_module: Any, args: tuple[Any, ...]) -> None:
        x_TF, per_expert = args[0].detach().abs(), [int(count) for count in args[1]]
        parts = x_TF[: sum(per_expert)].split(per_expert)
        record.add("ffn", torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts]))

    return hook
