from types import SimpleNamespace

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import build_model
from nemo_opt.models.config import RopeScaling, preset
from nemo_opt.models.sizes import check_vocabulary, model_config_of, spec_of, unwrap

TINY = preset("tiny", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=200)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize(
    "changes", [{}, {"kv_channels": 16}, {"num_moe_experts": 4}, {"tie_embeddings": True, "rope_scaling": RopeScaling()}]
)
def test_sizes_are_read_back_from_the_weights(one_rank, spec, changes):
    config = TINY.with_(**changes)
    (model,) = build_model(config, one_rank, spec=spec, seed=None)
    assert model_config_of(model) == config
    del model.nemo_opt_config
    assert model_config_of([model]) == config.with_(vocab_size=256)


def test_sizes_follow_the_weights_after_pruning(one_rank):
    (model,) = build_model(TINY, one_rank, spec="local", seed=None)
    layer = model.decoder.layers[0]
    layer.mlp.linear_fc2.weight = torch.nn.Parameter(torch.empty(24, 40))
    layer.self_attention.linear_proj.weight = torch.nn.Parameter(torch.empty(24, 16))
    layer.self_attention.linear_qkv.weight = torch.nn.Parameter(torch.empty(4 * (4 + 2 * 2), 24))
    del model.decoder.layers[1]
    pruned = model_config_of(model)
    assert pruned == TINY.with_(
        num_layers=1, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, kv_channels=4, vocab_size=200
    )


def test_wrappers_are_taken_off(one_rank):
    chunks = build_model(TINY, one_rank, spec="local", seed=None)
    assert unwrap(chunks) is chunks[0]
    assert unwrap([SimpleNamespace(module=SimpleNamespace(module=chunks[0]))]) is chunks[0]
    with pytest.raises(ConfigError, match="expected one model chunk, got 2"):
        unwrap(chunks * 2)
    with pytest.raises(ConfigError, match="no GPTModel inside Linear"):
        unwrap(torch.nn.Linear(2, 2))


def test_vocabularies_must_agree():
    check_vocabulary(TINY, 200)
    check_vocabulary(TINY, 190, allow_unused_rows=True)
    for size, allow in ((190, False), (201, False), (201, True)):
        with pytest.raises(ConfigError, match=f"the tokenizer has {size} tokens, the model's vocabulary has 200"):
            check_vocabulary(TINY, size, allow_unused_rows=allow)


def test_chunks_and_wrappers_know_sizes_and_spec(one_rank):
    chunks = build_model(TINY, one_rank, spec="local", seed=None)
    for model in (chunks[0], chunks, chunks * 2, SimpleNamespace(module=chunks[0])):
        assert (model_config_of(model), spec_of(model)) == (TINY, "local")


def test_an_emptied_pipeline_stage_still_knows_the_sizes(one_rank):
    (model,) = build_model(TINY, one_rank, spec="local", seed=None)
    del model.decoder.layers[:]
    assert model_config_of(model) == TINY
