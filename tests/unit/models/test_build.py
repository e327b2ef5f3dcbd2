import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models import build
from nemo_opt.models.build import build_model, model_config_of, spec_of, transformer_config
from nemo_opt.models.config import PRESETS, RopeScaling, preset
from nemo_opt.parallel import Topology, parallel

TINY = preset("tiny", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=200)
TOKENS = torch.arange(16).reshape(1, 16)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_moe_experts": 4}, {"num_moe_experts": 2, "moe_router_topk": 1}])
def test_both_specs_compute_the_same_loss(one_rank, changes):
    config = TINY.with_(**changes)
    losses = {}
    for spec in ("local", "te"):
        (model,) = build_model(config, one_rank, spec=spec)
        assert spec_of(model) == spec
        losses[spec] = model(TOKENS, TOKENS, None, labels=TOKENS + 1)
    # measured: 9e-8 relative, one rounding of float32
    assert torch.allclose(losses["local"], losses["te"], rtol=1e-6, atol=0)
    assert losses["te"].mean().item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.05)


def test_padding_keeps_the_logits_of_the_vocabulary(one_rank):
    (model,) = build_model(TINY, one_rank, spec="local")
    logits_BSV = model(TOKENS, TOKENS, None)
    assert logits_BSV.shape == (1, 16, 256)
    assert not logits_BSV[..., 200:].any()


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling(factor=32.0),
        RopeScaling(factor=4.0, low_freq_factor=2.0, high_freq_factor=6.0, original_max_position_embeddings=64),
    ],
)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rope_frequencies_are_those_of_transformers(one_rank, scaling, base):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = TINY.with_(rotary_base=base, rope_scaling=scaling, kv_channels=64)
    (model,) = build_model(config, one_rank, spec="local", seed=None)
    rope = {"rope_type": "llama3", "rope_theta": base, **vars(scaling)}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=64, rope_parameters=rope))
    assert torch.equal(model.rotary_pos_emb.inv_freq, expected)


def test_overrides_reach_the_transformer_config():
    config = transformer_config(TINY, Topology(), spec="local", dtype=torch.bfloat16, calculate_per_token_loss=True)
    assert (config.calculate_per_token_loss, config.bf16, config.params_dtype, config.pipeline_dtype) == (True, True, *[torch.bfloat16] * 2)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("layout", ["TP2PP2SP", "TP1PP2", "TP4CP2"])
def test_presets_configure_at_usual_layouts(name, layout):
    config, topology = PRESETS[name], Topology.from_name(layout)
    mcore_config = transformer_config(config, topology, spec="te")
    assert (mcore_config.num_layers, mcore_config.kv_channels) == (config.num_layers, config.head_dim)
    assert (mcore_config.tensor_model_parallel_size, mcore_config.sequence_parallel) == (topology.tp, topology.sp)


@pytest.mark.parametrize(
    ("changes", "layout", "spec", "message"),
    [
        ({}, "TP3", "local", "num_attention_heads 8 % tp 3 != 0"),
        ({}, "PP4", "local", r"num_layers 2 % \(pp 4 \* vp 1\) != 0"),
        ({}, "CP2", "local", "cp 2 needs spec 'te'"),
        ({}, "EP2", "local", "dense"),
        ({}, "TP1", "apex", r"unknown layer spec 'apex'; known are \['local', 'te'\]"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, layout, spec, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(TINY.with_(**changes), Topology.from_name(layout), spec=spec)


def test_te_spec_needs_transformer_engine(monkeypatch):
    monkeypatch.setattr(build, "HAVE_TE", False)
    with pytest.raises(ConfigError, match="spec 'te' needs Transformer Engine"):
        transformer_config(TINY, Topology(), spec="te")


def test_building_needs_the_ranks_laid_out_so(one_rank):
    with pytest.raises(ConfigError, match=r"ranks are laid out as .* \(1, 1, 1, 1\).*tp=2"):
        build_model(TINY, Topology(tp=2))


def test_building_needs_parallel_state(monkeypatch):
    monkeypatch.setattr(build.parallel_state, "model_parallel_is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"call nemo_opt.parallel.initialize\(topology\) first"):
        build_model(TINY, Topology())


def _layers_of_chunks(names):
    found = {}
    for name in names:
        topology = Topology.from_name(name)
        with parallel(topology):
            chunks = build_model(PRESETS["tiny"], topology, seed=None)
            layers = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
            ends = [(chunk.pre_process, chunk.post_process) for chunk in chunks]
            found[name] = layers, ends, model_config_of(chunks[0]) == PRESETS["tiny"]
    return found


@pytest.mark.ranks
def test_stages_hold_their_layers(ranks):
    first, last = ranks(2).run(_layers_of_chunks, ["PP2", "PP2VP2", "PP2FIRST1", "TP2"])
    assert first == {
        "PP2": ([[1, 2]], [(True, False)], True),
        "PP2VP2": ([[1], [3]], [(True, False), (False, False)], True),
        "PP2FIRST1": ([[1]], [(True, False)], True),
        "TP2": ([[1, 2, 3, 4]], [(True, True)], True),
    }
    assert last == {
        "PP2": ([[3, 4]], [(False, True)], True),
        "PP2VP2": ([[2], [4]], [(False, False), (False, True)], True),
        "PP2FIRST1": ([[2, 3, 4]], [(False, True)], True),
        "TP2": ([[1, 2, 3, 4]], [(True, True)], True),
    }
