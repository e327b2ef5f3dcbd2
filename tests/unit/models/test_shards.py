from unittest.mock import Mock, patch

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import build_model
from nemo_opt.models.config import preset
from nemo_opt.models.shards import Shard, full_tensors, gather_full, parameter_shards
from nemo_opt.parallel import Topology, parallel

TINY = preset("tiny", num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=200)


@pytest.fixture
def model(one_rank):
    """A tiny model on one rank, in a list as build_model returns it."""
    return build_model(TINY, one_rank, spec="local")


def test_keys_spell_out_the_layer_and_the_halves_of_swiglu(model):
    shapes = {shard.key: shard.global_shape for shard in parameter_shards(model)}
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (32,),
        "self_attention.linear_qkv.weight": (64, 32),
        "self_attention.linear_proj.weight": (32, 32),
        "mlp.linear_fc1.layer_norm_weight": (32,),
        "mlp.linear_fc1.weight_w": (48, 32),
        "mlp.linear_fc1.weight_v": (48, 32),
        "mlp.linear_fc2.weight": (32, 48),
    }
    assert shapes == {
        "embedding.word_embeddings.weight": (256, 32),
        **{f"decoder.layers.{i}.{key}": shape for i in (0, 1) for key, shape in layer.items()},
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (256, 32),
    }


def test_shards_are_views_into_the_parameters(model):
    for number, shard in enumerate(parameter_shards(model), start=1):
        shard.tensor.fill_(number)
    assert sum(p.sum().item() for p in model[0].parameters()) == sum(
        number * shard.tensor.numel() for number, shard in enumerate(parameter_shards(model), start=1)
    )
    gate, up = model[0].decoder.layers[1].mlp.linear_fc1.weight.detach().chunk(2)
    halves = {shard.key[-2:]: shard.tensor for shard in parameter_shards(model) if "layers.1.mlp.linear_fc1.weight" in shard.key}
    assert torch.equal(halves["_w"], gate)
    assert torch.equal(halves["_v"], up)


def test_gradients_come_under_the_same_keys(model):
    assert parameter_shards(model, of="grad") == []
    for parameter in model[0].parameters():
        parameter.grad = 2 * parameter.detach()
    values = {shard.key: shard.tensor for shard in parameter_shards(model)}
    gradients = {shard.key: shard.tensor for shard in parameter_shards(model, of="grad")}
    assert gradients.keys() == values.keys()
    assert all(torch.equal(gradients[key], 2 * values[key]) for key in values)


def test_main_grad_of_ddp_comes_before_grad(model):
    parameter = model[0].decoder.final_layernorm.weight
    parameter.grad, parameter.main_grad = torch.zeros(32), torch.ones(32)
    (shard,) = parameter_shards(model, of="grad")
    assert shard.key == "decoder.final_layernorm.weight"
    assert torch.equal(shard.tensor, torch.ones(32))


def test_wrappers_make_no_difference(model):
    wrapped = torch.nn.Module()
    wrapped.module = model[0]
    assert [shard.key for shard in parameter_shards([wrapped])] == [shard.key for shard in parameter_shards(model)]


def test_modelopts_settings_are_not_pickled_for_a_list_of_shards(model):
    from modelopt.torch.opt.plugins.megatron import register_modelopt_extra_state_callbacks

    pickled = Mock(return_value={"setting": 1})
    register_modelopt_extra_state_callbacks(model[0].decoder.layers[1].mlp.linear_fc2, pickled, Mock())
    assert any("layers.1.mlp.linear_fc2" in shard.key for shard in parameter_shards(model))
    pickled.assert_not_called()
    with patch.object(model[0], "sharded_state_dict", side_effect=RuntimeError), pytest.raises(RuntimeError):
        parameter_shards(model)
    assert model[0].state_dict()["decoder.layers.1.mlp.linear_fc2._extra_state"].numel(), "whatever happened, a checkpoint holds them"


def test_one_rank_gathers_its_own_weights(model):
    full = gather_full(parameter_shards(model))
    assert torch.equal(full["output_layer.weight"], model[0].output_layer.weight.detach())
    assert list(full) == sorted(full)


def test_shards_that_do_not_cover_a_weight_are_refused(model):
    shard = parameter_shards(model)[0]
    half = Shard(key=shard.key, global_shape=(2 * shard.global_shape[0], *shard.global_shape[1:]), offset=shard.offset, tensor=shard.tensor)
    with pytest.raises(ConfigError, match=f"{shard.key} has {2 * shard.tensor.numel()} elements, the ranks hold {shard.tensor.numel()}"):
        gather_full([half])


def _gathered_equals_local():
    topology = Topology(tp=2)
    with parallel(topology):
        chunks = build_model(TINY, topology, spec="local")
        shards = parameter_shards(chunks)
        full = {key: tensor for key, tensor in full_tensors(shards) if tensor is not None}
        everyone = [full]
        torch.distributed.broadcast_object_list(everyone, src=0)
        equal = [torch.equal(everyone[0][shard.key][shard.index], shard.tensor) for shard in shards]
        return len(full), len(equal), all(equal)


@pytest.mark.ranks
def test_whole_weights_consist_of_the_shards_of_all_ranks(ranks):
    (first, *_), (second, *_) = results = ranks(2).run(_gathered_equals_local)
    assert (first, second) == (17, 0)
    assert all(count > 7 and equal for _, count, equal in results)


def _disagreeing_shapes():
    rank = torch.distributed.get_rank()
    shard = Shard(key="w", global_shape=(2 + rank,), offset=(0,), tensor=torch.zeros(2 + rank))
    with pytest.raises(ConfigError) as raised:
        gather_full([shard])
    return str(raised.value)


@pytest.mark.ranks
def test_ranks_that_disagree_about_a_shape_are_told_on_every_rank(ranks):
    assert ranks(2).run(_disagreeing_shapes) == ["w is (2,) on one rank and (3,) on rank 1"] * 2
