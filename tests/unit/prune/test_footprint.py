"""The formulas against models built with those sizes, and against ModelOpt's own."""

import math

import nemo_opt._stack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.nas.plugins.megatron_model_stats import mcore_memory_footprint_mb, mcore_param_count

from nemo_opt.models.build import build_model, transformer_config
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune.footprint import METRICS, active_parameters, footprint, memory_mb, parameters

TINY = preset("tiny", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=200)


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


CHANGES = [{}, {"kv_channels": 16, "num_query_groups": 2}, {"tie_embeddings": True}, {"num_moe_experts": 4}, {"num_layers": 1}]


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_parameters_are_those_of_a_built_model(one_rank, spec, changes):
    config = TINY.with_(**changes)
    (model,) = build_model(config, one_rank, spec=spec, seed=None)
    assert parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@st.composite
def models(draw):
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.none() | st.integers(2, 5))
    return TINY.with_(
        num_layers=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(1, 90)),
        ffn_hidden_size=draw(st.integers(1, 90)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 700)),
        tie_embeddings=draw(st.booleans()),
        num_moe_experts=experts,
        moe_router_topk=draw(st.integers(1, experts or 2)),
    )


@given(model=models(), seq_length=st.integers(1, 9000), batch_size=st.integers(1, 9))
def test_all_metrics_are_modelopts(model, seq_length, batch_size):
    mcore = transformer_config(model, Topology(), spec="local")
    total, active = mcore_param_count(mcore, model.padded_vocab_size, model.tie_embeddings)
    *_, memory = mcore_memory_footprint_mb(
        mcore, model.padded_vocab_size, model.tie_embeddings, sequence_length=seq_length, batch_size=batch_size
    )
    assert parameters(model) == total
    assert active_parameters(model) == active
    assert math.isclose(memory_mb(model, sequence_length=seq_length, batch_size=batch_size), memory, rel_tol=1e-12)
    costs = footprint(model, sequence_length=seq_length, batch_size=batch_size)
    assert list(costs) == list(METRICS)
    assert costs == {"active_params": active, "params": total, "memory_mb": pytest.approx(memory, rel=1e-12)}


def test_published_sizes():
    assert parameters(preset("llama3.1-8b")) == 8_030_261_248  # as published
    assert parameters(preset("llama3.2-1b")) == 1_235_814_400
    # 2 bytes a parameter, and for each of 32 layers and 4096 tokens 2 * 8 heads of 128 channels
    assert memory_mb(preset("llama3.1-8b")) == pytest.approx((2 * 8_030_261_248 + 2 * 32 * 4096 * 2 * 8 * 128) / 2**20)
    assert footprint(preset("llama3.1-8b"))["memory_mb"] == memory_mb(preset("llama3.1-8b"))
