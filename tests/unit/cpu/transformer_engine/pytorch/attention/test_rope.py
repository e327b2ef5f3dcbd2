"""Rotary embeddings against rotation matrices."""

import pytest
import torch

from nemo_opt.cpu.transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from nemo_opt.errors import ConfigError


def _angles(positions, size=4):
    frequencies = 0.7 ** torch.arange(size // 2)
    return torch.outer(torch.arange(float(positions)), frequencies)  # [positions, size / 2]


def _freqs(positions, interleaved, size=4):
    angles = _angles(positions, size)
    both = torch.stack([angles, angles], -1).flatten(-2) if interleaved else torch.cat([angles, angles], -1)
    return both[:, None, None, :]


def _rotated(t, positions, interleaved):
    """[S, B, H, D] with the first four features turned, pair by pair, as complex numbers."""
    turning = t[..., :4]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    phase = torch.polar(torch.ones(()), _angles(64))[positions][:, None, None, :]
    turned = torch.view_as_real(torch.complex(first, second) * phase)
    turned = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
    return torch.cat([turned, t[..., 4:]], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [4, 6])
def test_turns_pairs_by_their_position(interleaved, size):
    t = torch.randn(5, 2, 3, size, requires_grad=True)
    expected = _rotated(t, torch.arange(5), interleaved)
    out = apply_rotary_pos_emb(t, _freqs(8, interleaved), interleaved=interleaved, fused=True)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.pow(3).sum(), t)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads)
    batch_first = apply_rotary_pos_emb(t.transpose(0, 1), _freqs(8, interleaved), tensor_format="bshd", interleaved=interleaved)
    torch.testing.assert_close(batch_first.transpose(0, 1), expected)


def test_start_positions_move_each_row():
    t = torch.randn(3, 2, 1, 4)
    out = apply_rotary_pos_emb(t, _freqs(8, False), start_positions=torch.tensor([0, 5]))
    torch.testing.assert_close(out[:, :1], _rotated(t[:, :1], torch.arange(3), False))
    torch.testing.assert_close(out[:, 1:], _rotated(t[:, 1:], torch.arange(5, 8), False))


def test_packed_sequences_start_at_zero_and_are_cut_at_both_ends():
    t = torch.randn(6, 3, 4)
    bounds = torch.tensor([0, 4, 12])
    out = apply_rotary_pos_emb(t, _freqs(8, False), tensor_format="thd", cu_seqlens=bounds, cp_size=2, cp_rank=1)
    positions = torch.tensor([1, 2, 2, 3, 4, 5])
    torch.testing.assert_close(out, _rotated(t[:, None], positions, False)[:, 0])


def test_bfloat16_is_turned_in_float32():
    t = torch.randn(5, 1, 1, 4).bfloat16()
    torch.testing.assert_close(
        apply_rotary_pos_emb(t, _freqs(5, False)), _rotated(t.float(), torch.arange(5), False).bfloat16(), rtol=0, atol=0
    )


def test_refusals():
    t = torch.zeros(4, 1, 1, 4)
    with pytest.raises(ConfigError, match="cu_seqlens"):
        apply_rotary_pos_emb(t, _freqs(8, False), tensor_format="thd")
    with pytest.raises(ConfigError, match="hdsb"):
        apply_rotary_pos_emb(t, _freqs(8, False), tensor_format="hdsb")
    with pytest.raises(ConfigError, match="2 positions"):
        apply_rotary_pos_emb(t, _freqs(2, False))
