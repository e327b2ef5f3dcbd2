import nemo_opt._stack

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp

from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.norms import on_norm_output

SIZES = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=2, vocab_size=120)


@pytest.fixture(scope="module")
def models(one_rank):
    """The same weights in both layer specs, norms that are not 1."""
    made = {spec: build_model(SIZES, one_rank, spec=spec, seed=1)[0] for spec in ("local", "te")}
    with torch.no_grad():
        for model in made.values():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter += torch.sin(torch.arange(16.0)) / 4
    return made


def outputs(model, *, hook):
    """Of the two norms of the layer in a forward pass."""
    layer, seen = model.decoder.layers[0], []
    places = (layer.input_layernorm, layer.self_attention.linear_qkv), (layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
    handles = [hook(norm, linear, seen) for norm, linear in places]
    tokens = torch.arange(8).expand(2, 8)
    model(tokens, tokens, None)
    for handle in handles:
        handle.remove()
    return seen


def ours(norm, linear, seen):
    return on_norm_output(norm, linear, seen.append)


def plainly(norm, _linear, seen):
    return norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))


def test_both_layer_specs_show_the_same(models):
    local, te = (outputs(models[spec], hook=ours) for spec in ("local", "te"))
    for one, other in zip(local, te, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.shape == (8, 2, 16)


def test_a_fused_norms_own_module_shows_its_input(models):
    """Why this module exists: a hook on it, which is what upstream places, sees hidden states that are not normalised, without an error."""
    assert isinstance(models["te"].decoder.layers[0].input_layernorm, IdentityOp)
    for plain, normed in zip(outputs(models["te"], hook=plainly), outputs(models["te"], hook=ours), strict=True):
        assert (plain - normed).abs().max() > 0.1


def test_gradients_of_both_layer_specs_are_the_same(models):
    """Through what is computed again, to the norm's weight and to what it normalises."""
    found = []
    for spec, weight in (("local", "input_layernorm.weight"), ("te", "self_attention.linear_qkv.layer_norm_weight")):
        model = models[spec]
        model.zero_grad()
        first, second = outputs(model, hook=ours)
        (first.square().sum() + (second * torch.arange(16.0)).sum()).backward()
        found.append([model.decoder.layers[0].get_parameter(weight).grad, model.embedding.word_embeddings.weight.grad])
    for one, other in zip(*found, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_a_norm_that_is_neither_module_nor_fused_is_an_error():
    with pytest.raises(AssertionError, match="must be fused into a linear"):
        on_norm_output(IdentityOp(), None, print)
