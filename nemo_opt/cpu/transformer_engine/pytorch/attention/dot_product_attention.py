"""`DotProductAttention`: softmax(Q K^T) V with every mask type, grouped queries, packed sequences and context parallelism.

Decisions:
- Masks are computed from positions, so that the zig-zag layout of context parallelism needs no reordering of keys.
- Packed sequences ("thd") are attended one after the other: there is no mask to get wrong between documents.
- A query that may see no key (padding) gets zeros, and no gradient.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn import functional

from nemo_opt.cpu.transformer_engine.pytorch.attention._masks import (
    combine,
    normalise_mask_type,
    padding_allowed,
    position_allowed,
    window_of,
)
from nemo_opt.cpu.transformer_engine.pytorch.attention._positions import gather_sequence, rank_positions
from nemo_opt.cpu.transformer_engine.pytorch.module.base import TransformerEngineBaseModule, refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["DotProductAttention"]

_FORMATS = ("sbhd", "bshd", "thd")
_CP_COMM_TYPES = ("p2p", "all_gather", "a2a")


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
        tracked = get_rng_state_tracker is not None and not sequence_parallel
        self._get_rng_state_tracker = get_rng_state_tracker if tracked else None
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

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
    ) -> torch.Tensor:
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
            [S, B, H * Dv], [B, S, H * Dv] or [T, H * Dv].

        Raises:
            ConfigError: a setting is refused, or the arguments do not fit together.
        """
        refuse_options("DotProductAttention", {"alibi_slopes": alibi_slopes, "inference_params": inference_params})
        bias = self._bias(core_attention_bias_type, core_attention_bias)
        call = self._call(qkv_format, attn_mask_type, window_size, bias)
        if call.qkv_format == "thd":
            bounds = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
            return self._attend_packed(query_layer, key_layer, value_layer, call, bounds)
        if call.qkv_format == "bshd":
            query_layer, key_layer, value_layer = (t.transpose(0, 1) for t in (query_layer, key_layer, value_layer))
        mask = attention_mask
        if "padding" in call.mask_type and mask is None:
            mask = _mask_from_bounds(cu_seqlens_q, cu_seqlens_kv, query_layer.shape[0], key_layer.shape[0])
        out = self._attend_batch(query_layer, key_layer, value_layer, call, mask)
        return out.transpose(0, 1) if call.qkv_format == "bshd" else out

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

    def _attend_batch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call, mask: Any) -> torch.Tensor:
        """Attention of [S, B, H, D] tensors, whole or cut by context parallelism."""
        group = self._cp_group()
        if group is not None:
            self._check_cut(query, key, call, mask)
            ranks, rank = group.size(), group.rank()
            length = query.shape[0] * ranks
            key, value = gather_sequence(key, value, group)
            query_positions = rank_positions(length, ranks, rank)
            key_positions = torch.cat([rank_positions(length, ranks, r) for r in range(ranks)])
        else:
            query_positions = torch.arange(query.shape[0])
            key_positions = torch.arange(key.shape[0])
            if call.bottom_right:
                query_positions = query_positions + key.shape[0] - query.shape[0]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if group is None and call.mask_type == "causal" and call.window == (-1, 0) and call.bias is None:
            out = self._core(q, k, v, None, causal=True)
        else:
            allowed = position_allowed(query_positions, key_positions, call.window)
            if "padding" in call.mask_type and mask is not None:
                allowed = combine(allowed, padding_allowed(mask))
            elif call.mask_type == "arbitrary" and mask is not None:
                allowed = combine(allowed, ~mask)
            out = self._core(q, k, v, allowed, bias=call.bias)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call, bounds: tuple[torch.Tensor | None, ...]
    ) -> torch.Tensor:
        """Attention within each of the sequences packed in [T, H, D] tensors."""
        if "padding" not in call.mask_type or call.bias is not None:
            raise ConfigError(f'qkv_format="thd" takes padding masks and no bias; got attn_mask_type={call.mask_type!r}.')
        cu_q, cu_k, cu_q_padded, cu_k_padded = bounds
        if cu_q is None or cu_k is None:
            raise ConfigError('qkv_format="thd" needs cu_seqlens_q and cu_seqlens_kv.')
        group = self._cp_group()
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        if group is not None:
            key, value = gather_sequence(key, value, group)
        queries = _sequences(cu_q, cu_q_padded, ranks)
        keys = _sequences(cu_k, cu_k_padded, ranks)
        key_shards, value_shards = key.chunk(ranks), value.chunk(ranks)
        pieces = []
        end = 0
        for (q_start, q_rows, q_length), (k_start, k_rows, k_length) in zip(queries, keys, strict=True):
            pieces.append(_zeros(query, value, q_start - end))
            q_positions = rank_positions(q_rows * ranks, ranks, rank)
            k_positions = torch.cat([rank_positions(k_rows * ranks, ranks, r) for r in range(ranks)])
            k_piece = torch.cat([shard[k_start : k_start + k_rows] for shard in key_shards])
            v_piece = torch.cat([shard[k_start : k_start + k_rows] for shard in value_shards])
            shift = k_length - q_length if call.bottom_right else 0
            allowed = position_allowed(q_positions + shift, k_positions, call.window)
            tokens = (q_positions < q_length)[:, None] & (k_positions < k_length)[None, :]
            allowed = combine(allowed, None if bool(tokens.all()) else tokens)
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query[q_start : q_start + q_rows], k_piece, v_piece))
            pieces.append(self._core(q, k, v, allowed)[0].transpose(0, 1).flatten(1))
            end = q_start + q_rows
        pieces.append(_zeros(query, value, query.shape[0] - end))
        return torch.cat(pieces)

    def _core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        allowed: torch.Tensor | None,
        *,
        causal: bool = False,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, H, Sq, Dv] from [B, H, Sq, D], [B, G, Sk, D] and [B, G, Sk, Dv]."""
        if q.shape[1] != k.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        sees_any = None
        if allowed is not None:
            sees_any = allowed.any(-1, keepdim=True)
            if bool(sees_any.all()):
                sees_any = None
            else:
                allowed = allowed | ~sees_any
        mask = allowed
        if bias is not None:
            mask = bias.to(q.dtype) if allowed is None else bias.to(q.dtype).masked_fill(~allowed, float("-inf"))
        dropout = self.attention_dropout if self.training else 0.0
        with self._dropout_rng(dropout):
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.softmax_scale
            )
        return out if sees_any is None else out * sees_any

    def _dropout_rng(self, dropout: float) -> AbstractContextManager[Any]:
        return self._rng_fork() if dropout > 0 else nullcontext()

    def _cp_group(self) -> ProcessGroup | None:
        return None if self.cp_group is None or self.cp_group.size() == 1 else self.cp_group

    def _check_cut(self, query: torch.Tensor, key: torch.Tensor, call: _Call, mask: Any) -> None:
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


def _zeros(query: torch.Tensor, value: torch.Tensor, rows: int) -> torch.Tensor:
    """Output rows of tokens between sequences."""
    return query.new_zeros(rows, query.shape[1] * value.shape[-1])


def _sequences(cu: torch.Tensor, cu_padded: torch.Tensor | None, ranks: int) -> list[tuple[int, int, int]]:
    """(first row on this rank, rows on this rank, tokens without padding on all ranks) of each packed sequence."""
    bounds = (cu if cu_padded is None else cu_padded).tolist()
    lengths = (cu[1:] - cu[:-1]).tolist()
    return [(start // ranks, (end - start) // ranks, n) for start, end, n in zip(bounds[:-1], bounds[1:], lengths, strict=True)]


def _mask_from_bounds(cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, sq: int, sk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding masks ([B, 1, 1, Sq], [B, 1, 1, Sk]) of sequences that start at their row's first token.

    Raises:
        ConfigError: there are no bounds.
    """
    if cu_q is None or cu_k is None:
        raise ConfigError("A padding mask needs attention_mask, or cu_seqlens_q and cu_seqlens_kv.")

    def mask(cu: torch.Tensor, size: int) -> torch.Tensor:
        return (torch.arange(size)[None, :] >= (cu[1:] - cu[:-1])[:, None])[:, None, None, :]

    return mask(cu_q, sq), mask(cu_k, sk)


def _forgive_missing_extra_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Checkpoints of Megatron-Core do not hold the attention's (empty) extra state."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("core_attention._extra_state")]
