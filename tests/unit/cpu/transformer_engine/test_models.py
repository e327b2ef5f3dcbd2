"""Whole models: Megatron-Core's local layer spec and the TE spec on the reference are the same model, on every layout."""

import nemo_opt._stack

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_opt.models.build import build_model
from nemo_opt.parallel import Topology, parallel
from nemo_opt.testing import parity
from nemo_opt.testing.parity import TINY, TINY_MOE


@pytest.fixture(scope="module")
def reference(ranks):
    """Loss and gradients of the local spec on one rank, by model."""
    measured = {}

    def measure(model):
        if model not in measured:
            [measured[model]] = ranks(1).run(parity.measure, parity.TrainingCase(spec="local", model=model))
        return measured[model]

    return measure


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP1", *(pytest.param(name, marks=pytest.mark.wide) for name in ("TP2PP1", "TP2PP1SP", "CP2"))])
def test_te_spec_equals_local_spec(ranks, reference, layout):
    parity.require_parity(ranks, parity.TrainingCase(layout=layout, spec="te", model=TINY), reference=reference(TINY))


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP1", *(pytest.param(name, marks=pytest.mark.wide) for name in ("EP2", "TP2PP1SP"))])
def test_te_experts_equal_local_experts(ranks, reference, layout):
    parity.require_parity(ranks, parity.TrainingCase(layout=layout, spec="te", model=TINY_MOE), reference=reference(TINY_MOE))


PACKED_BOUNDS = torch.tensor([0, 4, 16], dtype=torch.int32)


def _packed_losses(layout, fused_rope):
    """Where this rank's tokens stand in the packed row, and their losses."""
    import transformer_engine_torch as tex
    from megatron.core import parallel_state

    with parallel(Topology.from_name(layout)) as topology:
        [model] = build_model(TINY, topology, spec="te", seed=3, apply_rope_fusion=fused_rope)
        size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        mine = tex.thd_get_partitioned_indices(PACKED_BOUNDS, 16, size, rank).long()
        tokens, _, _ = _inputs(16, 1)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=PACKED_BOUNDS, cu_seqlens_kv=PACKED_BOUNDS, max_seqlen_q=12, max_seqlen_kv=12
        )
        positions = torch.cat([torch.arange(4), torch.arange(12)])[None]
        loss = model(tokens[:, :-1][:, mine], positions[:, mine], None, labels=tokens[:, 1:][:, mine], packed_seq_params=packed)
        return mine, loss.detach()[0]


@pytest.mark.ranks
@pytest.mark.parametrize("fused_rope", [False, True])
def test_packed_documents_cut_by_context_parallelism(ranks, fused_rope):
    [(_, whole)] = ranks(1).run(_packed_losses, "TP1PP1", False)
    for mine, loss in ranks(2).run(_packed_losses, "CP2", fused_rope):
        torch.testing.assert_close(loss, whole[mine], rtol=1e-5, atol=1e-5)


def _inputs(length=16, rows=2):
    tokens = torch.randint(0, TINY.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(rows, -1)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return tokens, positions, mask


def _loss_and_gradients(chunks, *args, **kwargs):
    [model] = chunks
    loss = model(*args, **kwargs)
    model.zero_grad()
    loss.mean().backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _run(spec, model=TINY, **overrides):
    tokens, positions, mask = _inputs()
    chunks = build_model(model, Topology(), spec=spec, seed=3, **overrides)
    return chunks, _loss_and_gradients(chunks, tokens[:, :-1], positions, mask, labels=tokens[:, 1:])


def _assert_equal_runs(one, other, rename=lambda name: name):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert one[1]
    for name, grad in one[1].items():
        largest = grad.abs().max().item()
        torch.testing.assert_close(other[1][rename(name)], grad, rtol=0, atol=1e-5 * largest)


def _te_name(name):
    """The TE spec's name of a parameter of the local spec."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@pytest.mark.parametrize(
    "overrides",
    [
        {"apply_rope_fusion": True},
        {"add_bias_linear": True},
        {"normalization": "LayerNorm"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"window_size": (3, 0)},
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
        {"qk_layernorm": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_megatron_core(overrides):
    """The option on the TE spec against the local spec with what it means there: nothing for fusions and recomputation."""
    same_numbers = ("apply_rope_fusion", "recompute_granularity", "cross_entropy_loss_fusion")
    local = {} if next(iter(overrides)) in same_numbers else overrides
    with parallel(Topology()):
        _, expected = _run("local", **local)
        _, run = _run("te", **overrides)
        _assert_equal_runs(expected, run, _te_name)


@pytest.mark.parametrize(
    "recomputation",
    [{"recompute_granularity": "selective"}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}],
    ids=["selective", "full"],
)
def test_recomputation_repeats_dropout(recomputation):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    runs = []
    with parallel(Topology()):
        for overrides in ({}, recomputation):
            model_parallel_cuda_manual_seed(5, force_reset_rng=True)
            runs.append(_run("te", attention_dropout=0.3, hidden_dropout=0.2, **overrides)[1])
    _assert_equal_runs(*runs)


def test_zero_centred_gamma_is_gamma_minus_one():
    tokens, positions, mask = _inputs()
    with parallel(Topology()):
        plain, expected = _run("te")
        centred = build_model(TINY, Topology(), spec="te", seed=None, layernorm_zero_centered_gamma=True)
        weights = {name: weight - 1 if "norm" in name else weight for name, weight in plain[0].state_dict().items() if weight is not None}
        centred[0].load_state_dict(weights, strict=False)
        run = _loss_and_gradients(centred, tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    _assert_equal_runs(expected, run)


def test_grouped_experts_equal_one_by_one():
    with parallel(Topology()):
        _, expected = _run("te", TINY_MOE)
        _, fused = _run("te", TINY_MOE, moe_permute_fusion=True, moe_router_fusion=True)
        _assert_equal_runs(expected, fused)


def test_packed_documents_equal_single_documents():
    with parallel(Topology()):
        chunks = build_model(TINY, Topology(), spec="te", seed=3)
        tokens, _, mask = _inputs(16, 1)
        lengths = [5, 11]
        expected = []
        for document, targets in zip(tokens[:, :-1].split(lengths, 1), tokens[:, 1:].split(lengths, 1), strict=True):
            size = document.shape[1]
            expected.append(chunks[0](document, torch.arange(size)[None], mask[..., :size, :size], labels=targets))
        bounds = torch.tensor([0, 5, 16], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=11, max_seqlen_kv=11)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        loss = chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:], packed_seq_params=packed)
    torch.testing.assert_close(loss, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_state_dict_has_the_keys_of_transformer_engine():
    with parallel(Topology()):
        [model] = build_model(TINY, Topology(), spec="te", seed=None)
    linears = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
    layer = {f"{linear}.{key}" for linear in linears for key in ("weight", "_extra_state")}
    layer |= {f"{linear}.layer_norm_weight" for linear in ("self_attention.linear_qkv", "mlp.linear_fc1")}
    layer |= {"self_attention.core_attention._extra_state"}
    expected = {f"decoder.layers.{i}.{key}" for i in range(TINY.num_layers) for key in layer}
    expected |= {"decoder.final_layernorm.weight", "decoder.final_layernorm._extra_state"}
    expected |= {"embedding.word_embeddings.weight", "output_layer.weight", "output_layer._extra_state"}
    assert set(model.state_dict()) == expected
