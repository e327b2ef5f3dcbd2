"""Which elements of which old weight are in each new one, by a choice made up here, on one rank in this process."""

from unittest.mock import patch

import nemo_opt._stack

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.models.shards import Shard
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune.selection import Kept, KeptLayer
from nemo_opt.prune.slicing import _Cuts, _pass_on, _Piece, slice_model
from nemo_opt.testing import pruning as testing

SMALL = preset(
    "tiny", num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=6, num_query_groups=3, kv_channels=4, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
HIDDEN = [0, 3, 4, 9, 15]
FFN = [[1, 23], [0, 2], [7, 8], [22, 23]]


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


def channels(blocks, size=4):
    return [block * size + element for block in blocks for element in range(size)]


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("experts", [None, 4])
def test_each_new_weight_is_cut_from_its_old_one(one_rank, spec, experts):
    model = SMALL.with_(num_moe_experts=experts)
    chunks = testing.contrasted_model(one_rank, model, spec)
    old = testing.whole_weights(chunks)
    stay = [1, 3] if experts else [0]
    ffn = FFN if experts else FFN[:1]
    heads, groups = [0, 5], [0, 2]
    layer = KeptLayer(heads=heads, groups=groups, ffn=ffn, experts=stay if experts else None)
    slice_model(chunks[0], Kept(hidden=HIDDEN, layers={1: layer, 3: layer}))
    expected = {
        "embedding.word_embeddings.weight": old["embedding.word_embeddings.weight"][:, HIDDEN],
        "output_layer.weight": old["output_layer.weight"][:, HIDDEN],
        "decoder.final_layernorm.weight": old["decoder.final_layernorm.weight"][HIDDEN],
    }
    qkv = channels(
        [0, 2, 3, 9, 10, 11]
    )  # each group has two heads, its key and its value: the first head of the first, the second of the third
    for new, before in enumerate((0, 2)):
        ours, theirs = f"decoder.layers.{new}", f"decoder.layers.{before}"
        cuts = {
            "self_attention.linear_qkv.weight": (qkv, HIDDEN),
            "self_attention.linear_proj.weight": (HIDDEN, channels(heads)),
        }
        for name, (rows, columns) in cuts.items():
            expected[f"{ours}.{name}"] = old[f"{theirs}.{name}"][rows][:, columns]
        for name in (name for name in old if name.startswith(theirs) and old[name].dim() == 1):
            expected[name.replace(theirs, ours)] = old[name][HIDDEN]
        for index, expert in enumerate(stay):
            mine, was = (f"mlp.experts.experts.{i}" if experts else "mlp" for i in (index, expert))
            for half in ("weight_w", "weight_v"):
                expected[f"{ours}.{mine}.linear_fc1.{half}"] = old[f"{theirs}.{was}.linear_fc1.{half}"][ffn[expert]][:, HIDDEN]
            expected[f"{ours}.{mine}.linear_fc2.weight"] = old[f"{theirs}.{was}.linear_fc2.weight"][HIDDEN][:, ffn[expert]]
        if experts:
            expected[f"{ours}.mlp.router.weight"] = old[f"{theirs}.mlp.router.weight"][stay][:, HIDDEN]
    new_weights = testing.whole_weights(chunks)
    assert new_weights.keys() == expected.keys()
    assert [name for name, weight in new_weights.items() if not torch.equal(weight, expected[name])] == []


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("input_layernorm.bias", HIDDEN, None),
        ("mlp.linear_fc1.layer_norm_bias", HIDDEN, None),
        ("self_attention.q_layernorm.weight", range(4), None),
        ("self_attention.k_layernorm.weight", range(4), None),
        ("self_attention.linear_qkv.bias", channels([0, 2, 3, 9, 10, 11]), None),
        ("self_attention.linear_proj.bias", HIDDEN, None),
        ("mlp.linear_fc1.bias_v", [1, 23], None),
        ("mlp.linear_fc2.bias", HIDDEN, None),
        ("mlp.linear_fc2.weight", HIDDEN, [1, 23]),
    ],
)
def test_each_weight_of_a_layer_has_its_rows_and_columns(name, rows, columns):
    """Also those that the models built here do not have: biases, and norms of queries and keys."""
    layer = KeptLayer(heads=[0, 5], groups=[0, 2], ffn=FFN[:1])
    old_key, indices = _Cuts(SMALL, Kept(hidden=HIDDEN, layers={3: layer})).of(f"decoder.layers.0.{name}", 1 if columns is None else 2)
    assert old_key == f"decoder.layers.2.{name}"
    assert indices == ([rows] if columns is None else [rows, columns])


class Pair:
    """A group of two, of which this is the first."""

    def size(self):
        return 2

    def rank(self):
        return 0


@pytest.mark.parametrize("owner", [0, 1])
def test_a_piece_is_shown_to_the_group_as_it_was_cut(owner):
    whole = torch.arange(48.0, dtype=torch.bfloat16).view(8, 6)
    rows, columns = [1, 5, 7], [0, 2]
    mine = Shard(key="w", global_shape=(3, 2), offset=(0, 0), tensor=torch.zeros(3, 2, dtype=torch.bfloat16))
    last = Shard(key="w", global_shape=(3, 2), offset=(2, 1), tensor=torch.zeros(1, 1, dtype=torch.bfloat16))
    shown = []

    def broadcast(tensor, *, group, group_src):
        shown.append((tuple(tensor.shape), tensor.dtype, group_src))
        if group_src != 0:
            tensor.copy_(whole[rows[1:]][:, columns])

    def pass_on(kept):
        with patch("nemo_opt.prune.slicing.dist.broadcast", broadcast):
            piece = _Piece(owner, (4, 0), (4, 6), torch.bfloat16)
            _pass_on(piece, whole[4:] if owner == 0 else None, [kept, columns], [mine, last], Pair())

    pass_on(rows)
    assert shown == [((2, 2), torch.bfloat16, owner)]
    assert mine.tensor.tolist() == [[0, 0], *whole[rows[1:]][:, columns].tolist()]
    assert last.tensor.item() == whole[7, 2]
    pass_on([0, 3])
    assert len(shown) == 1, "nothing of this piece stays"
