"""`DotProductAttention`: softmax(Q K^T) V with every mask type, grouped queries, packed sequences and context parallelism.

Decisions:
- Masks are computed from positions, so that the zig-zag layout of context parallelism needs no reordering of keys.
- Packed sequences ("thd") are attended one after the other: there is no mask to get wrong between documents.
- A query that may see no key (padding) gets zeros, and no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nemo_opt.cpu.transformer_engine.pytorch.attention._core import CoreOptions, attend
from nemo_opt.cpu.transformer_engine.pytorch.attention._masks import (
    combine,
    normalise_mask_type,
    padding_allowed,
    padding_of_bounds,
    position_allowed,
    window_of,
)
from nemo_opt.cpu.transformer_engine.pytorch.attention._packed import PackedBounds, attend_packed
from nemo_opt.cpu.transformer_engine.pytorch.attention._positions import gather_sequence, rank_positions
from nemo_opt.cpu.transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["DotProductAttention"]

_FORMATS = ("sbhd", "bshd", "thd")
_CP_COMM_TYPES = ("p2p", "all_gather", "a2a")
_SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
_Mask = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call's settings, checked."""

    qkv_format: str
    mask_type: str
    window: tuple[int, int]
    bottom_right: bool
    bias: torch.Tensor | None


class DotProductAttention(TransformerEngineBaseModule):
    """Attention of queries over keys and values.

    Args:
        num_attention_heads: heads of the queries, before cutting by tensor parallelism.
        kv_channels: size of a head, or (of keys, of values).
        num_gqa_groups: heads of keys and values; as many as of queries by default.
        attention_dropout: probability to drop an attention weight.
        qkv_format: "sbhd", "bshd" or "thd".
        attn_mask_type: one of "no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right",
            "arbitrary".
        window_size: (positions to the left, to the right) a query sees; -1 is no limit.
        sequence_parallel: dropout draws from the surrounding random state instead of the tracker's.
        tp_size: tensor-parallel ranks, when the group is not given.
        get_rng_state_tracker: gives the tracker under whose state dropout is drawn.
        tp_group: tensor-parallel ranks.
        layer_number: number of the layer.
        attention_type: "self" or "cross".
        cp_group: context-parallel ranks.
        cp_global_ranks: their global numbers; without effect.
        cp_stream: without effect.
        cp_comm_type: "p2p", "all_gather" or "a2a"; all give the same result.
        softmax_scale: factor of the scores; 1 / sqrt(size of a head) by default.
        softmax_type: "vanilla"; "off-by-one" adds 1 to the denominator, "learnable" the exponential of a parameter of each head.
        return_max_logit: also return the largest score of each head.

    Raises:
        ConfigError: a setting is unknown, or heads do not divide.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        self._set_parallel_state(tp_group, tp_size, sequence_parallel)
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        if num_attention_heads % self.num_gqa_groups or self.num_gqa_groups % self.tp_size:
            raise ConfigError(
                f"DotProductAttention: {num_attention_heads} heads, {self.num_gqa_groups} groups and tp_size={self.tp_size} do not divide."
            )
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        self.qkv_format = _known("qkv_format", qkv_format, _FORMATS)
        self.attn_mask_type = normalise_mask_type(attn_mask_type)
        self.window_size = window_of(self.attn_mask_type, window_size)
        self.attention_type = _known("attention_type", attention_type, ("self", "cross"))
        self.layer_number = 1 if layer_number is None else layer_number
        key_size, value_size = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = key_size, value_size
        self.softmax_scale = 1.0 / math.sqrt(key_size) if softmax_scale is None else softmax_scale
        self.attention_dropout = attention_dropout
        self.return_max_logit = bool(return_max_logit)
        self.softmax_type = _known("softmax_type", softmax_type, _SOFTMAX_TYPES)
        self._make_softmax_offset()
        tracked = get_rng_state_tracker is not None and not sequence_parallel
        self._get_rng_state_tracker = get_rng_state_tracker if tracked else None
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

    def _make_softmax_offset(self) -> None:
        heads = self.num_attention_heads // self.tp_size
        if self.softmax_type == "learnable":
            self._add_parameter("softmax_offset", torch.zeros(heads), torch.nn.init.zeros_)
        else:
            self.softmax_offset = torch.zeros(heads) if self.softmax_type == "off-by-one" else None

    def set_context_parallel_group(
        self, cp_group: ProcessGroup | None, cp_global_ranks: list[int] | None, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        """Set the ranks among which sequences are cut; None for whole sequences.

        Raises:
            ConfigError: the scheme is unknown or hierarchical.
        """
        self.cp_comm_type = _known("cp_comm_type", cp_comm_type, _CP_COMM_TYPES)
        self.cp_group = cp_group
        self.cp_global_ranks = cp_global_ranks
        self.cp_stream = cp_stream

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            query_layer: [S, B, H, D], [B, S, H, D] or [T, H, D], by format.
            key_layer: the same with the heads of the groups.
            value_layer: the same with the size of the values.
            attention_mask: True is masked. Padding: [B, 1, 1, S] or a pair (queries, keys) of such; arbitrary: broadcast to [B, H, Sq, Sk].
                Not read for other mask types.
            qkv_format: overrides the module's.
            cu_seqlens_q: [N + 1] bounds of the sequences' tokens, padding not counted.
            cu_seqlens_kv: the same of keys.
            cu_seqlens_q_padded: [N + 1] bounds with padding counted ("thd"); as `cu_seqlens_q` by default.
            cu_seqlens_kv_padded: the same of keys.
            max_seqlen_q: without effect.
            max_seqlen_kv: without effect.
            attn_mask_type: overrides the module's.
            window_size: overrides the module's.
            checkpoint_core_attention: without effect on the result.
            core_attention_bias_type: "no_bias", "pre_scale_bias" or "post_scale_bias".
            core_attention_bias: broadcast to [B, H, Sq, Sk].
            alibi_slopes: refused.
            fast_zero_fill: without effect.
            inference_params: refused.
            pad_between_seqs: without effect: padding is always taken from the bounds.

        Returns:
            [S, B, H * Dv], [B, S, H * Dv] or [T, H * Dv]; with `return_max_logit` also [H], the largest score of each head.

        Raises:
            ConfigError: a setting is refused, or the arguments do not fit together.
        """
        refuse_options("DotProductAttention", {"alibi_slopes": alibi_slopes, "inference_params": inference_params})
        bias = self._bias(core_attention_bias_type, core_attention_bias)
        call = self._call(qkv_format, attn_mask_type, window_size, bias)
        if call.qkv_format == "thd":
            bounds = PackedBounds(query=cu_seqlens_q, key=cu_seqlens_kv, query_padded=cu_seqlens_q_padded, key_padded=cu_seqlens_kv_padded)
            out, maxima = self._attend_packed(query_layer, key_layer, value_layer, call, bounds)
        else:
            mask = attention_mask
            if "padding" in call.mask_type and mask is None:
                sequence = 1 if call.qkv_format == "bshd" else 0
                mask = padding_of_bounds(cu_seqlens_q, cu_seqlens_kv, query_layer.shape[sequence], key_layer.shape[sequence])
            out, maxima = self._attend_batch(query_layer, key_layer, value_layer, call, mask)
        return (out, self._largest_logit(maxima)) if self.return_max_logit else out

    def _call(self, qkv_format: str | None, mask_type: str | None, window: tuple[int, int] | None, bias: torch.Tensor | None) -> _Call:
        kind = self.attn_mask_type if mask_type is None else normalise_mask_type(mask_type)
        return _Call(
            qkv_format=self.qkv_format if qkv_format is None else _known("qkv_format", qkv_format, _FORMATS),
            mask_type=kind,
            window=window_of(kind, self.window_size if window is None else window),
            # Transformer Engine aligns windows to the last query and key unless the mask is causal from the first.
            bottom_right=kind not in ("causal", "padding_causal"),
            bias=bias,
        )

    def _bias(self, kind: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        if kind == "no_bias":
            return None
        if kind not in ("pre_scale_bias", "post_scale_bias") or bias is None:
            raise ConfigError(f"core_attention_bias_type={kind!r} needs core_attention_bias, and to be pre_scale_bias or post_scale_bias.")
        return bias * self.softmax_scale if kind == "pre_scale_bias" else bias

    def _attend_batch(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call, mask: _Mask
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Attention of [S, B, H, D] or [B, S, H, D] tensors, whole or cut by context parallelism."""
        batch_first = call.qkv_format == "bshd"
        if batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        group = self._cp_group()
        if group is not None:
            self._check_cut(query, key, call)
            key, value = gather_sequence(key, value, group)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        options = self._core_options()
        if group is None and call.mask_type == "causal" and call.window == (-1, 0) and call.bias is None:
            out, largest = attend(q, k, v, options, causal=True)
        else:
            allowed = self._allowed(query.shape[0], key.shape[0], call, mask)
            out, largest = attend(q, k, v, options, allowed=allowed, bias=call.bias)
        out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
        return out.flatten(2), [] if largest is None else [largest]

    def _allowed(self, num_queries: int, num_keys: int, call: _Call, mask: _Mask) -> torch.Tensor | None:
        """What each of this rank's queries may see of all keys, broadcast to [B, H, Sq, Sk]; None for everything."""
        group = self._cp_group()
        if group is not None:
            ranks = group.size()
            query_positions = rank_positions(num_keys, ranks, group.rank())
            key_positions = torch.cat([rank_positions(num_keys, ranks, rank) for rank in range(ranks)])
            return position_allowed(query_positions, key_positions, call.window)
        shift = num_keys - num_queries if call.bottom_right else 0
        allowed = position_allowed(torch.arange(num_queries) + shift, torch.arange(num_keys), call.window)
        if mask is None or call.mask_type in ("no_mask", "causal", "causal_bottom_right"):
            return allowed
        if call.mask_type == "arbitrary":
            assert isinstance(mask, torch.Tensor)
            return combine(allowed, ~mask)
        if call.mask_type == "padding_causal_bottom_right" and num_queries != num_keys:
            raise ConfigError(
                'padding_causal_bottom_right with more keys than queries needs packed sequences (qkv_format="thd") in the CPU reference.'
            )
        return combine(allowed, padding_allowed(mask))

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call, bounds: PackedBounds
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if "padding" not in call.mask_type or call.bias is not None:
            raise ConfigError(f'qkv_format="thd" takes padding masks and no bias; got attn_mask_type={call.mask_type!r}.')
        options, group = self._core_options(), self._cp_group()
        return attend_packed(query, key, value, bounds, options, window=call.window, bottom_right=call.bottom_right, group=group)

    def _core_options(self) -> CoreOptions:
        return CoreOptions(
            scale=self.softmax_scale,
            dropout=self.attention_dropout if self.training else 0.0,
            rng=self._rng_fork,
            offset=self.softmax_offset,
            want_max=self.return_max_logit,
        )

    def _largest_logit(self, maxima: list[torch.Tensor]) -> torch.Tensor:
        """[H] over all sequences and context-parallel ranks."""
        largest = torch.stack(maxima).amax(0)
        group = self._cp_group()
        if group is not None:
            largest = largest.detach().clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return largest

    def _cp_group(self) -> ProcessGroup | None:
        return None if self.cp_group is None or self.cp_group.size() == 1 else self.cp_group

    def _check_cut(self, query: torch.Tensor, key: torch.Tensor, call: _Call) -> None:
        if call.mask_type not in ("causal", "no_mask") or call.bias is not None:
            raise ConfigError(
                f"Context parallelism takes the mask types causal and no_mask without a bias, got {call.mask_type!r}. "
                f'Pack the sequences (qkv_format="thd") instead of padding them.'
            )
        if query.shape[0] != key.shape[0]:
            raise ConfigError(f"Context parallelism needs as many queries as keys, got {query.shape[0]} and {key.shape[0]}.")


def _known(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"DotProductAttention({name}={value!r}) is not in the CPU reference; choose one of {', '.join(choices)}.")
    return value


def _forgive_missing_extra_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Checkpoints of Megatron-Core do not hold the attention's (empty) extra state."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("core_attention._extra_state")]
