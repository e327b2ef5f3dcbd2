"""Rotary position embeddings with the signature of Transformer Engine's fused kernel; computed in float32 as that is."""

import torch

from nemo_opt.cpu.transformer_engine.pytorch.attention._positions import rank_positions
from nemo_opt.errors import ConfigError

__all__ = ["apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    """Rotate pairs of features by angles that grow with the position.

    Args:
        t: [S, B, H, D] ("sbhd"), [B, S, H, D] ("bshd") or [T, H, D] ("thd"); features past the angles' are left alone.
        freqs: [positions, 1, 1, R] angles, R <= D.
        tensor_format: "sbhd", "bshd" or "thd".
        start_positions: [B] position of each row's first token; not for "thd".
        interleaved: pairs are neighbours instead of halves.
        fused: without effect: there is one implementation.
        cu_seqlens: [N + 1] bounds of the packed sequences, counted before cutting; for "thd".
        cp_size: context-parallel ranks; the angles are of the whole sequence.
        cp_rank: this rank.

    Returns:
        As `t`.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    if tensor_format == "thd":
        if cu_seqlens is None or start_positions is not None:
            raise ConfigError('apply_rotary_pos_emb(tensor_format="thd") needs cu_seqlens and takes no start_positions.')
        angles = freqs[_packed_positions(cu_seqlens, cp_size, cp_rank)].reshape(t.shape[0], 1, freqs.shape[-1])
        return _rotate(t, angles, interleaved)
    if tensor_format not in ("sbhd", "bshd"):
        raise ConfigError(f'apply_rotary_pos_emb(tensor_format={tensor_format!r}): only "sbhd", "bshd" and "thd" exist.')
    length = t.shape[1 if tensor_format == "bshd" else 0]
    positions = rank_positions(length * cp_size, cp_size, cp_rank)
    if int(positions.max()) >= freqs.shape[0]:
        raise ConfigError(f"Rotary angles for {freqs.shape[0]} positions do not reach position {int(positions.max())}.")
    if start_positions is None:
        angles = freqs[positions]  # [S, 1, 1, R]
    else:
        angles = freqs[positions[:, None] + start_positions.cpu()[None, :]].reshape(length, -1, 1, freqs.shape[-1])
    return _rotate(t, angles.transpose(0, 1) if tensor_format == "bshd" else angles, interleaved)


def _packed_positions(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """[T] position of each of this rank's tokens in its own sequence."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return torch.cat([rank_positions(length, cp_size, cp_rank) for length in lengths])


def _rotate(t: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rotated_size = angles.shape[-1]
    turning, still = t[..., :rotated_size], t[..., rotated_size:]
    wide = turning.to(torch.promote_types(t.dtype, torch.float32))
    angles = angles.to(wide.dtype)
    turned = (wide * angles.cos() + _quarter_turn(wide, interleaved) * angles.sin()).to(t.dtype)
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned


def _quarter_turn(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
