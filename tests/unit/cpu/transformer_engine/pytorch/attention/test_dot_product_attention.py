"""`DotProductAttention` against softmax written out, for every mask, format and option, and context parallelism on two ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.cpu.transformer_engine.pytorch.attention import DotProductAttention
from nemo_opt.cpu.transformer_engine.pytorch.attention._positions import rank_positions
from nemo_opt.errors import ConfigError

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64; torch's blocked softmax differs from the plain one by about 1e-15
HEADS, GROUPS, SIZE = 4, 2, 8


def _qkv(s=6, b=2, sk=None, value_size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(length, heads, size):
        return torch.randn(length, b, heads, size, dtype=torch.float64, generator=generator).requires_grad_()

    return make(s, HEADS, SIZE), make(sk or s, GROUPS, SIZE), make(sk or s, GROUPS, value_size)


def _plain(q, k, v, allowed=None, scale=None, bias=None, offset=None):
    """Softmax attention of [S, B, H, D] tensors, written out; `allowed` broadcasts to [B, H, Sq, Sk]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores if bias is None else scores + bias
    weights = scores.exp() if allowed is None else scores.exp() * allowed
    total = weights.sum(-1, keepdim=True) + (0 if offset is None else offset.exp().reshape(1, -1, 1, 1))
    out = torch.where(total > 0, weights / total.clamp_min(1e-300), 0.0) @ v
    return out.permute(2, 0, 1, 3).flatten(2)


def _check(out, expected, tensors):
    torch.testing.assert_close(out, expected, **EXACT)
    direction = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    grads, expected_grads = (torch.autograd.grad((y * direction).sum(), tensors) for y in (out, expected))
    torch.testing.assert_close(grads, expected_grads, **EXACT)


def _module(mask="causal", **kwargs):
    return DotProductAttention(HEADS, kwargs.pop("kv_channels", SIZE), num_gqa_groups=GROUPS, attn_mask_type=mask, **kwargs)


def _causal(sq, sk, shift=0):
    return torch.arange(sk)[None, :] <= torch.arange(sq)[:, None] + shift


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])[:, None, None, :]
BOTH_TOKENS = ~(PADDING | PADDING.transpose(-1, -2))
ARBITRARY = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.6


@pytest.mark.parametrize(
    ("mask", "given_mask", "allowed"),
    [
        ("no_mask", None, None),
        ("no_mask", PADDING, None),
        ("causal", None, _causal(6, 6)),
        ("causal", PADDING, _causal(6, 6)),
        ("causal_bottom_right", None, _causal(6, 6)),
        ("padding", PADDING, BOTH_TOKENS),
        ("padding", (PADDING, PADDING), BOTH_TOKENS),
        ("padding", ~BOTH_TOKENS, BOTH_TOKENS),
        ("padding,causal", PADDING, BOTH_TOKENS & _causal(6, 6)),
        ("padding_causal_bottom_right", PADDING, BOTH_TOKENS & _causal(6, 6)),
        ("arbitrary", ARBITRARY, ~ARBITRARY),
        ("arbitrary", None, None),
    ],
)
@pytest.mark.parametrize("bshd", [False, True])
def test_masks(mask, given_mask, allowed, bshd):
    tensors = _qkv()
    arranged = [t.transpose(0, 1) if bshd else t for t in tensors]
    out = _module(mask, qkv_format="bshd" if bshd else "sbhd")(*arranged, attention_mask=given_mask)
    _check(out.transpose(0, 1) if bshd else out, _plain(*tensors, allowed), tensors)


def test_a_query_without_keys_gets_zeros():
    q, k, v = _qkv()
    out = _module("padding")(q, k, v, attention_mask=PADDING)
    assert out[4:, 1].eq(0).all()
    assert out[:, 0].ne(0).all()


@pytest.mark.parametrize(("mask", "shift"), [("causal", 0), ("causal_bottom_right", 3)])
def test_more_keys_than_queries(mask, shift):
    tensors = _qkv(3, sk=6)
    _check(_module(mask)(*tensors), _plain(*tensors, _causal(3, 6, shift)), tensors)


@settings(max_examples=25, deadline=None)
@given(left=st.integers(-1, 7), right=st.integers(-1, 7), causal=st.booleans(), seed=st.integers(0, 99))
def test_sliding_windows(left, right, causal, seed):
    tensors = _qkv(seed=seed)
    distance = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    allowed = (distance >= -left) | torch.tensor(left < 0)
    allowed &= (distance <= right) | torch.tensor(right < 0)
    allowed = allowed & (distance <= 0) if causal else allowed
    out = _module("causal" if causal else "no_mask", window_size=(left, 0 if causal else right))(*tensors)
    if causal:
        allowed = ((distance >= -left) | torch.tensor(left < 0)) & (distance <= 0)
    _check(out, _plain(*tensors, allowed), tensors)


def test_window_and_mask_of_the_call_override_the_modules():
    tensors = _qkv()
    out = _module("causal")(*tensors, attn_mask_type="no_mask", window_size=(1, 1))
    distance = (torch.arange(6)[None, :] - torch.arange(6)[:, None]).abs()
    _check(out, _plain(*tensors, distance <= 1), tensors)


def test_scale_and_value_size():
    tensors = _qkv(value_size=3)
    _check(_module(kv_channels=(SIZE, 3), softmax_scale=0.3)(*tensors), _plain(*tensors, _causal(6, 6), scale=0.3), tensors)


@pytest.mark.parametrize("kind", ["pre_scale_bias", "post_scale_bias"])
def test_bias(kind):
    tensors = _qkv()
    bias = torch.randn(1, HEADS, 6, 6, dtype=torch.float64)
    out = _module("causal", softmax_scale=0.3)(*tensors, core_attention_bias_type=kind, core_attention_bias=bias)
    _check(out, _plain(*tensors, _causal(6, 6), scale=0.3, bias=bias * (0.3 if kind == "pre_scale_bias" else 1)), tensors)


@pytest.mark.parametrize("kind", ["off-by-one", "learnable"])
@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_sinks(kind, mask):
    tensors = _qkv()
    module = _module(mask, softmax_type=kind)
    assert ("softmax_offset" in dict(module.named_parameters())) == (kind == "learnable")
    if kind == "learnable":
        with torch.no_grad():
            module.softmax_offset.copy_(torch.linspace(-1, 1, HEADS))
        tensors = (*tensors, module.softmax_offset)
    expected = _plain(*tensors[:3], _causal(6, 6) if mask == "causal" else None, offset=module.softmax_offset.double())
    direction = torch.sin(torch.arange(expected.numel(), dtype=expected.dtype)).reshape(expected.shape)
    out = module(*tensors[:3])
    torch.testing.assert_close(out, expected, **EXACT)
    grads, expected_grads = (torch.autograd.grad((y * direction).sum(), tensors) for y in (out, expected))
    torch.testing.assert_close(grads[:3], expected_grads[:3], **EXACT)
    if kind == "learnable":
        torch.testing.assert_close(grads[3], expected_grads[3])  # a float32 parameter


def test_largest_logit_counts_only_what_is_seen():
    q, k, v = _qkv()
    out, largest = _module("padding_causal", return_max_logit=True)(q, k, v, attention_mask=PADDING)
    allowed = BOTH_TOKENS & _causal(6, 6)
    scores = torch.einsum("ibhd,jbhd->bhij", q, k.repeat_interleave(2, 2)) / math.sqrt(SIZE)
    torch.testing.assert_close(largest, scores.masked_fill(~allowed, -torch.inf).amax((0, 2, 3)), **EXACT)
    torch.testing.assert_close(out, _plain(q, k, v, allowed), **EXACT)


class _Tracker:
    def __init__(self):
        self.forks = 0

    def fork(self, name=None):
        self.forks += 1
        return torch.random.fork_rng(devices=[])


@pytest.mark.parametrize("sinks", ["vanilla", "off-by-one"])
def test_dropout_draws_under_the_tracker_only_in_training(sinks):
    tracker = _Tracker()
    q, k, v = _qkv(16, 4)
    module = _module(attention_dropout=0.5, get_rng_state_tracker=lambda: tracker, softmax_type=sinks)
    first, second = module(q, k, v), module(q, k, v)
    assert tracker.forks == 2
    assert not torch.equal(first, _module(softmax_type=sinks)(q, k, v))
    torch.testing.assert_close(first, second)  # the same state both times
    torch.testing.assert_close(module.eval()(q, k, v), _module(softmax_type=sinks)(q, k, v))
    assert tracker.forks == 2
    outside = _module(attention_dropout=0.5, get_rng_state_tracker=lambda: tracker, sequence_parallel=True)
    outside(q, k, v)
    assert tracker.forks == 2


BOUNDS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)


def _documents(bounds):
    return torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds[1:] - bounds[:-1])


@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
@pytest.mark.parametrize("window", [None, (1, 0)])
def test_packed_sequences_do_not_see_each_other(mask, window):
    tensors = _qkv(9, 1)
    document = _documents(BOUNDS)
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    allowed = document[:, None] == document[None, :]
    allowed &= (distance <= 0) | torch.tensor(mask == "padding" and window is None)
    allowed &= torch.tensor(window is None) | ((distance >= -1) & (distance <= 0))
    module = _module(mask, window_size=window)
    out = module(*[t.squeeze(1) for t in tensors], qkv_format="thd", cu_seqlens_q=BOUNDS, cu_seqlens_kv=BOUNDS)
    _check(out.unsqueeze(1), _plain(*tensors, allowed), tensors)


def test_padding_between_packed_sequences_is_not_attended():
    padded = torch.tensor([0, 4, 6, 12], dtype=torch.int32)
    real = torch.cat([torch.arange(0, 3), torch.arange(4, 5), torch.arange(6, 11)])
    tensors = _qkv(13, 1)
    kwargs = {"cu_seqlens_q": BOUNDS, "cu_seqlens_kv": BOUNDS, "cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
    out = _module("padding_causal")(*[t.squeeze(1) for t in tensors], qkv_format="thd", **kwargs)
    document = _documents(BOUNDS)
    expected = torch.zeros(13, 1, HEADS * SIZE, dtype=torch.float64)
    allowed = (document[:, None] == document[None, :]) & _causal(9, 9)
    expected[real] = _plain(*[t[real] for t in tensors], allowed)
    _check(out.unsqueeze(1), expected, tensors)


def test_bounds_stand_for_a_padding_mask():
    tensors = _qkv()
    bounds = torch.tensor([0, 6, 10])
    for fmt in ("sbhd", "bshd"):
        arranged = [t.transpose(0, 1) if fmt == "bshd" else t for t in tensors]
        out = _module("padding", qkv_format=fmt)(*arranged, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        _check(out.transpose(0, 1) if fmt == "bshd" else out, _plain(*tensors, BOTH_TOKENS), tensors)
    with pytest.raises(ConfigError, match="attention_mask"):
        _module("padding")(*tensors)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"attn_mask_type": "diagonal"}, "diagonal"),
        ({"qkv_format": "hdsb"}, "hdsb"),
        ({"attention_type": "sideways"}, "sideways"),
        ({"cp_comm_type": "a2a+p2p"}, "a2a"),
        ({"softmax_type": "sparse"}, "sparse"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"num_gqa_groups": 3}, "do not divide"),
        ({"num_gqa_groups": 1, "tp_size": 2}, "do not divide"),
    ],
)
def test_settings_are_refused_by_name(kwargs, named):
    with pytest.raises(ConfigError, match=named):
        DotProductAttention(**{"num_attention_heads": 4, "kv_channels": 8, **kwargs})


def test_calls_are_refused_by_name():
    q, k, v = _qkv(3, sk=6)
    packed = [t.squeeze(1) for t in _qkv(9, 1)]
    with pytest.raises(ConfigError, match="alibi_slopes"):
        _module()(q, k, v, alibi_slopes=torch.ones(4))
    with pytest.raises(ConfigError, match="core_attention_bias_type"):
        _module()(q, k, v, core_attention_bias_type="alibi")
    with pytest.raises(ConfigError, match="padding masks"):
        _module()(*packed, qkv_format="thd", attn_mask_type="causal", cu_seqlens_q=BOUNDS, cu_seqlens_kv=BOUNDS)
    with pytest.raises(ConfigError, match="cu_seqlens_q"):
        _module()(*packed, qkv_format="thd", attn_mask_type="padding")
    with pytest.raises(ConfigError, match="packed sequences"):
        _module("padding_causal_bottom_right")(q, k, v, attention_mask=(PADDING[..., :3], PADDING))


def test_missing_extra_state_is_forgiven():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core_attention = _module()

    layer = Layer()
    assert list(layer.state_dict()) == ["core_attention._extra_state"]
    assert not layer.load_state_dict({}).missing_keys


def _cut_by_context(mask, window, comm_type, softmax_type):
    import torch.distributed as dist

    rank = dist.get_rank()
    mine = rank_positions(8, 2, rank)
    local = [t.detach()[mine].requires_grad_() for t in _qkv(8)]
    module = _module(mask, window_size=window, cp_group=dist.group.WORLD, cp_comm_type=comm_type, softmax_type=softmax_type)
    out = module(*local)
    direction = torch.sin(torch.arange(8 * 2 * HEADS * SIZE, dtype=torch.float64)).reshape(8, 2, -1)[mine]
    return out.detach(), torch.autograd.grad((out * direction).sum(), local)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("mask", "window", "comm_type", "softmax_type"),
    [
        ("causal", None, "p2p", "vanilla"),
        ("no_mask", None, "all_gather", "vanilla"),
        ("causal", (2, 0), "a2a", "vanilla"),
        ("causal", None, "p2p", "off-by-one"),
    ],
)
def test_context_parallel_on_two_ranks_equals_one(ranks, mask, window, comm_type, softmax_type):
    tensors = _qkv(8)
    expected = _module(mask, window_size=window, softmax_type=softmax_type)(*tensors)
    direction = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).reshape(expected.shape)
    grads = torch.autograd.grad((expected * direction).sum(), tensors)
    for rank, (out, rank_grads) in enumerate(ranks(2).run(_cut_by_context, mask, window, comm_type, softmax_type)):
        mine = rank_positions(8, 2, rank)
        torch.testing.assert_close(out, expected[mine], **EXACT)
        torch.testing.assert_close(rank_grads, tuple(grad[mine] for grad in grads), **EXACT)


CUT_BOUNDS = torch.tensor([0, 4, 12], dtype=torch.int32)
CUT_TOKENS = torch.tensor([0, 3, 9], dtype=torch.int32)  # one and two tokens of padding


def _packed_cut_by_context(tokens):
    import torch.distributed as dist

    from nemo_opt.cpu.transformer_engine.extension import thd_get_partitioned_indices

    mine = thd_get_partitioned_indices(CUT_BOUNDS, 12, 2, dist.get_rank()).long()
    local = [t.detach().squeeze(1)[mine].requires_grad_() for t in _qkv(12, 1)]
    module = _module("padding_causal", qkv_format="thd", cp_group=dist.group.WORLD, return_max_logit=True)
    bounds = {"cu_seqlens_q": tokens, "cu_seqlens_kv": tokens, "cu_seqlens_q_padded": CUT_BOUNDS, "cu_seqlens_kv_padded": CUT_BOUNDS}
    out, largest = module(*local, **bounds)
    direction = torch.sin(torch.arange(12 * HEADS * SIZE, dtype=torch.float64)).reshape(12, -1)[mine]
    return mine, out.detach(), torch.autograd.grad((out * direction).sum(), local), largest.detach()


@pytest.mark.ranks
@pytest.mark.parametrize("tokens", [CUT_BOUNDS, CUT_TOKENS], ids=["full", "padded"])
def test_packed_context_parallel_on_two_ranks_equals_one(ranks, tokens):
    tensors = [t.detach().squeeze(1).requires_grad_() for t in _qkv(12, 1)]
    bounds = {"cu_seqlens_q": tokens, "cu_seqlens_kv": tokens, "cu_seqlens_q_padded": CUT_BOUNDS, "cu_seqlens_kv_padded": CUT_BOUNDS}
    expected, expected_largest = _module("padding_causal", qkv_format="thd", return_max_logit=True)(*tensors, **bounds)
    direction = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).reshape(expected.shape)
    grads = torch.autograd.grad((expected * direction).sum(), tensors)
    for mine, out, rank_grads, largest in ranks(2).run(_packed_cut_by_context, tokens):
        torch.testing.assert_close(out, expected[mine], **EXACT)
        torch.testing.assert_close(rank_grads, tuple(grad[mine] for grad in grads), **EXACT)
        torch.testing.assert_close(largest, expected_largest.detach(), **EXACT)


def _refused_when_cut():
    import torch.distributed as dist

    module = _module(cp_group=dist.group.WORLD)
    messages = []
    q, k, v = _qkv(4)
    odd, more = _qkv(3), _qkv(4, sk=8)
    mask = torch.zeros(2, 1, 1, 4, dtype=torch.bool)
    for args, kwargs in [((q, k, v), {"attn_mask_type": "padding", "attention_mask": mask}), (odd, {}), (more, {})]:
        try:
            module(*args, **kwargs)
        except ConfigError as error:
            messages.append(str(error))
    return messages


@pytest.mark.ranks
def test_what_context_parallelism_cannot_cut_is_refused(ranks):
    for padding, odd, more in ranks(2).run(_refused_when_cut):
        assert "Pack the sequences" in padding
        assert "6 tokens" in odd
        assert "as many queries" in more
