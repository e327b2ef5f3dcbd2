import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.models import init
from nemo_opt.models.build import build_model
from nemo_opt.models.config import preset
from nemo_opt.models.init import seeded_init
from nemo_opt.models.shards import Shard, gather_full, parameter_shards
from nemo_opt.parallel import Topology, parallel

# 300 tokens: the last of the three blocks that pad the vocabulary (384 rows) has padding rows, and TP2 cuts inside a block.
TINY = preset("tiny", hidden_size=32, ffn_hidden_size=48, vocab_size=300)
MOE = TINY.with_(num_layers=2, num_moe_experts=4)


def _full(config, topology, spec="local", seed=1234):
    return gather_full(parameter_shards(build_model(config, topology, spec=spec, seed=seed)))


def _digests(full):
    return {key: (tuple(t.shape), hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()) for key, t in full.items()}


def _digests_of_layouts(config, names, specs):
    found = {}
    for name in names:
        topology = Topology.from_name(name)
        with parallel(topology):
            found |= {(name, spec): _digests(_full(config, topology, spec)) for spec in specs}
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ["TP2", "PP2VP2", "PP2FIRST1"]),
        pytest.param(2, ["TP2SP", "PP2", "CP2", "DP2"], marks=pytest.mark.wide),
        pytest.param(4, ["TP2PP2"], marks=pytest.mark.wide),
    ],
)
def test_every_layout_starts_from_the_same_weights(ranks, one_rank, size, names):
    expected = _digests(_full(TINY, one_rank))
    digests, *_ = ranks(size).run(_digests_of_layouts, TINY, names, ["te"])
    assert len(expected) == 3 + 4 * 7
    for layout, found in digests.items():
        assert found == expected, layout


@pytest.mark.ranks
def test_experts_start_from_the_same_weights_everywhere(ranks, one_rank):
    expected = _digests(_full(MOE, one_rank))
    digests, *_ = ranks(2).run(_digests_of_layouts, MOE, ["EP2", "TP2"], ["local", "te"])
    assert {key.split(".experts.experts.")[1] for key in expected if "layers.0.mlp.experts" in key} == {
        f"{expert}.linear_{weight}" for expert in range(4) for weight in ("fc1.weight_w", "fc1.weight_v", "fc2.weight")
    }
    for layout, found in digests.items():
        assert found == expected, layout


def test_both_specs_start_from_the_same_weights(one_rank):
    assert _digests(_full(TINY, one_rank, "te")) == _digests(_full(TINY, one_rank, "local"))


def test_seeds_differ(one_rank):
    one, two = (_digests(_full(TINY, one_rank, seed=seed)) for seed in (1, 2))
    assert {key for key in one if one[key] == two[key]} == {key for key in one if "norm" in key}


def test_scales_are_those_of_megatron(one_rank):
    config = preset("tiny", num_layers=8, vocab_size=250, init_method_std=0.1)
    for key, tensor in _full(config, one_rank).items():
        if "norm" in key:
            assert torch.equal(tensor, torch.ones_like(tensor)), key
            continue
        std = 0.1 / 4 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.1  # sqrt(2 * 8 layers) = 4
        # the standard error of a standard deviation over 128 * 128 draws is 0.6 %, of the mean std / 128
        assert tensor[:250].std().item() == pytest.approx(std, rel=0.03), key
        assert abs(tensor[:250].mean().item()) < 5 * std / 128, key


def test_rows_that_pad_the_vocabulary_are_zero(one_rank):
    full = _full(TINY, one_rank)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert full[key].shape[0] == 384
        assert not full[key][300:].any()
        assert full[key][:300].any(dim=1).all()


def test_init_can_be_repeated_in_place(one_rank):
    chunks = build_model(TINY, one_rank, spec="local", seed=None)
    seeded_init(chunks, 5)
    first = gather_full(parameter_shards(chunks))
    for parameter in chunks[0].parameters():
        parameter.data.fill_(torch.nan)
    seeded_init(chunks, 5)
    assert all(torch.equal(tensor, first[key]) for key, tensor in gather_full(parameter_shards(chunks)).items())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_rectangle_holds_what_the_whole_weight_holds_there(data):
    rows, columns = data.draw(st.integers(1, 3 * init._BLOCK_ROWS)), data.draw(st.integers(1, 5))
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, columns - column))
    whole = Shard(key="w", global_shape=(rows, columns), offset=(0, 0), tensor=torch.empty(rows, columns))
    part = Shard(key="w", global_shape=(rows, columns), offset=(row, column), tensor=torch.empty(height, width))
    for shard in (whole, part):
        init._fill(shard, 7, 0.02)
    assert torch.equal(part.tensor, whole.tensor[part.index])
