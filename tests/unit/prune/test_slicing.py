"""Pruned models on every kind of layout, against weights sliced by hand and against ModelOpt's own pruning."""

import contextlib
import io

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology

SMALL = preset(
    "tiny", num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip
TARGETS = {"hidden_size": 20, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 2}
MODELS = {  # name -> (sizes, targets)
    "dense": (SMALL, TARGETS),
    "tied": (SMALL.with_(tie_embeddings=True), TARGETS),
    "experts": (SMALL.with_(num_moe_experts=4), {**TARGETS, "num_moe_experts": 2}),
    # NeMo's L2 test but for the vocabulary, which takes time and is not pruned; 12 heads in 12 groups
    "68m": (
        preset("68m", vocab_size=128),
        {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "num_layers": 2},
    ),
}
BOTH, TE = ("te", "local"), ("te",)
LAYOUTS = {  # name -> (models, specs)
    "TP2": (["dense", "tied"], BOTH),
    "PP2": (["dense", "tied", "68m"], BOTH),
    "DP2": (["dense"], BOTH),
    "CP2": (["dense"], TE),  # the local spec has no context parallelism
    "TP2SP": (["dense", "experts"], BOTH),
    "EP2": (["experts"], BOTH),
    "PP2FIRST1": (["dense"], TE),
    "TP4": (["dense"], TE),  # two query groups on four ranks afterwards
    "TP2PP2": (["dense", "tied"], BOTH),
    "TP2EP2SP": (["experts"], TE),
}
SCORES_TOLERANCE = 1e-6
"""Of the largest score; float32 activations summed in another order: 1.7e-7 over LAYOUTS and both specs."""
TOLERANCE = 1e-5
"""The project's goal for logits, of the largest one; seen: 0 against hand-sliced weights, 4e-7 over layouts and specs."""


def _prune(name, kinds, specs, folder=None):
    """Each of `kinds` at one layout with each of `specs`, in one start of the ranks."""
    from nemo_opt.models.build import model_config_of
    from nemo_opt.prune.importance import measure_importance
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model
    from nemo_opt.testing import pruning as testing
    from nemo_opt.training.forward import forward_loop

    topology, results = Topology.from_name(name), {}
    for kind in kinds:
        config, targets = MODELS[kind]
        for spec in TE if kind == "68m" else specs:
            chunks = testing.contrasted_model(topology, config, spec)
            shown = testing.batches(count=4)
            marks = testing.marks(chunks[0])
            scores = measure_importance(chunks, forward_loop(shown, description="test"))
            prune_language_model(chunks, {f"target_{name}": size for name, size in targets.items()}, scores=scores)
            assert all(mark == marks[name] for name, mark in testing.marks(chunks[0]).items())
            assert chunks[0].training
            if folder:
                save_pruned_model(chunks, f"{folder}/{name}_{kind}_{spec}")
            results[kind, spec] = {
                "scores": scores,
                "weights": testing.whole_weights(chunks),
                "config": model_config_of(chunks[0]),
                "logits": testing.logits(chunks, shown),
            }
    return results


class _Alone(dict):
    """What one rank makes of a model with a spec, made when first asked for."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def __missing__(self, key):
        kind, spec = key
        self.update(self.pool.run(_prune, "TP1PP1", [kind], (spec,))[0])
        return self[key]


@pytest.fixture(scope="module")
def alone(ranks):
    return _Alone(ranks(1))


def wide(*values, **options):
    """For the functional suite: see tests/unit/conftest.py."""
    return pytest.param(*values, marks=pytest.mark.wide, **options)


def _equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def _difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _assert_same_scores(ours, theirs):
    assert (ours.digest, ours.tokens, ours.model) == (theirs.digest, theirs.tokens, theirs.model)
    assert _difference(ours.hidden, theirs.hidden) < SCORES_TOLERANCE
    assert _difference(ours.layers, theirs.layers) < SCORES_TOLERANCE
    for name in ("ffn", "heads", "groups", "experts"):
        scores, expected = getattr(ours, name), getattr(theirs, name)
        assert scores.keys() == expected.keys()
        for number in scores:
            assert _difference(scores[number], expected[number]) < SCORES_TOLERANCE, (name, number)


def _assert_same(result, expected):
    assert result["config"] == expected["config"]
    _assert_same_scores(result["scores"], expected["scores"])
    assert _equal(result["weights"], expected["weights"])
    if result["logits"].shape == expected["logits"].shape:  # else each rank has a part of the data
        assert _difference(result["logits"], expected["logits"]) < TOLERANCE


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "kinds", "specs"),
    [
        pytest.param("TP2", ["dense"], ("te",), id="TP2-dense-te"),
        pytest.param("PP2", ["dense"], ("local",), id="PP2-dense-local"),
        pytest.param("EP2", ["experts"], ("te",), id="EP2-experts-te"),
        *(wide(layout, *cases, id=layout) for layout, cases in LAYOUTS.items()),
    ],
)
def test_every_layout_keeps_the_same_weights(ranks, alone, layout, kinds, specs):
    everyone = ranks(Topology.from_name(layout).world_size).run(_prune, layout, kinds, specs)
    assert len(everyone[0]) == sum(1 if kind == "68m" else len(specs) for kind in kinds)
    for (kind, spec), result in everyone[0].items():
        _assert_same(result, alone[kind, "te"])
        for rank in everyone:
            assert torch.equal(rank[kind, spec]["scores"].hidden, result["scores"].hidden)
            assert rank[kind, spec]["config"] == result["config"]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["dense", "tied", "experts"])
def test_both_specs_keep_the_same_weights(alone, kind):
    _assert_same(alone[kind, "local"], alone[kind, "te"])


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["dense", "tied", "experts", wide("68m")])
def test_sizes_are_the_targets(alone, kind):
    config, targets = MODELS[kind]
    sizes = alone[kind, "te"]["config"].to_dict()  # the local spec's are the same: above
    assert sizes == config.to_dict() | targets | {"kv_channels": config.head_dim}


def _by_hand(kind, spec):
    """Kept indices by the oracle's scores, the weights it slices, and the logits of a fresh model that holds them."""
    from nemo_opt.models.build import build_model
    from nemo_opt.models.shards import parameter_shards
    from nemo_opt.testing import pruning as testing

    config, targets = MODELS[kind]
    (dense,) = testing.contrasted_model(Topology(), config, spec)
    shown = testing.batches(count=4)
    oracle = testing.DenseOracle(dense, shown)
    weights = testing.hand_sliced(testing.whole_weights([dense]), oracle.kept(targets), config)
    small = build_model(config.with_(**targets, kv_channels=config.head_dim), Topology(), spec=spec, seed=None)
    for shard in parameter_shards(small):
        shard.tensor.copy_(weights[shard.key])
    scores = {name: getattr(oracle, name) for name in ("hidden", "ffn", "heads", "layers")}
    return {"weights": weights, "logits": testing.logits(small, shown), "scores": scores}


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "spec"), [("dense", "te"), ("dense", "local"), ("tied", "te"), wide("68m", "te")])
def test_one_rank_keeps_what_the_oracle_keeps(ranks, alone, kind, spec):
    expected, result = ranks(1).run(_by_hand, kind, spec)[0], alone[kind, spec]
    assert _equal(result["weights"], expected["weights"])
    assert _difference(result["logits"], expected["logits"]) < TOLERANCE
    scores, oracle = result["scores"], expected["scores"]
    assert _difference(scores.hidden, oracle["hidden"]) < SCORES_TOLERANCE
    assert _difference(scores.layers, torch.tensor([oracle["layers"][n] for n in range(len(scores.layers))])) < SCORES_TOLERANCE
    for number in scores.ffn:
        assert _difference(scores.ffn[number], oracle["ffn"][number - 1]) < SCORES_TOLERANCE
        assert _difference(scores.heads[number], oracle["heads"][number - 1]) < SCORES_TOLERANCE


def _expert_scores_by_hand(weights, normed, layer, top_k=2):
    """Scores of a layer's experts and of their channels: routed and computed token by token from whole weights."""
    prefix = f"decoder.layers.{layer}.mlp"
    best = (normed @ weights[f"{prefix}.router.weight"].t()).topk(top_k, dim=-1)
    chance = best.values.softmax(dim=-1)
    norms, channels = [], []
    for expert in range(4):
        gate, up, down = (
            weights[f"{prefix}.experts.experts.{expert}.{n}"] for n in ("linear_fc1.weight_w", "linear_fc1.weight_v", "linear_fc2.weight")
        )
        routed = (best.indices == expert).nonzero()
        x = normed[routed[:, 0]]
        inner = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) * chance[routed[:, 0], routed[:, 1]][:, None]
        norms.append((inner @ down.t()).norm(dim=-1).mean())
        channels.append(inner.abs().mean(dim=0))
    return torch.stack(norms), torch.stack(channels)


def _measure_experts(spec):
    from nemo_opt.prune.importance import measure_importance
    from nemo_opt.testing import pruning as testing

    (model,) = testing.contrasted_model(Topology(), MODELS["experts"][0], spec)
    shown, seen = testing.batches(count=4), {}

    def loop(gpt_model):
        assert not gpt_model.training
        assert not torch.is_grad_enabled()
        testing.logits([gpt_model], shown)

    for number, layer in enumerate(model.decoder.layers):
        layer.pre_mlp_layernorm.register_forward_hook(lambda *call, n=number: seen.setdefault(n, []).append(call[2].flatten(0, 1)))
    scores, weights = measure_importance(model, loop), testing.whole_weights([model])
    return scores, [_expert_scores_by_hand(weights, torch.cat(seen[number]), number) for number in range(4)]


@pytest.mark.ranks
@pytest.mark.parametrize("spec", ["te", "local"])
def test_experts_are_scored_by_the_tokens_that_reach_them(ranks, spec):
    scores, by_hand = ranks(1).run(_measure_experts, spec)[0]
    for number, (experts, channels) in enumerate(by_hand, start=1):
        assert _difference(scores.experts[number], experts) < SCORES_TOLERANCE
        assert _difference(scores.ffn[number], channels) < SCORES_TOLERANCE


WIDTHS = {"hidden_size": 20, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_layers": 2}  # what ModelOpt prunes


OVERRIDES = {  # of Megatron-Core's configuration
    "Llama": {},
    "biases": {"add_bias_linear": True, "add_qkv_bias": True, "layernorm_zero_centered_gamma": True},
    "LayerNorm": {"normalization": "LayerNorm", "gated_linear_unit": False, "layernorm_zero_centered_gamma": True},
}


def _modelopt_against_ours(name, kind):
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.testing import pruning as testing
    from nemo_opt.training.forward import forward_loop

    topology = Topology.from_name(name)
    (theirs,), ours = (testing.contrasted_model(topology, SMALL, "te", **OVERRIDES[kind]) for _ in range(2))
    shown = testing.batches(count=4)
    mode = get_mcore_minitron_config(hidden_size_divisor=20, ffn_hidden_size_divisor=24, num_layers_divisor=2)
    loop = forward_loop(shown, description="test")
    with contextlib.redirect_stdout(io.StringIO()):
        mtp.prune(
            theirs,
            mode=[("mcore_minitron", mode)],
            constraints={"export_config": dict(WIDTHS)},
            dummy_input=None,
            config={"forward_loop": loop},
        )
    assert prune_language_model(ours, {f"target_{name}": size for name, size in WIDTHS.items()}, loop) is ours
    pairs = dict(theirs.named_parameters()), dict(ours[0].named_parameters())
    return {
        "names": pairs[0].keys() == pairs[1].keys(),
        # ModelOpt orders what it keeps by importance: the same values stand in other places
        "values": all(
            torch.equal(tensor.flatten().sort().values, pairs[1][key].flatten().sort().values) for key, tensor in pairs[0].items()
        ),
        "logits": _difference(testing.logits(ours, shown), testing.logits([theirs], shown)),
    }


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "kind"), [("TP1PP1", "Llama"), wide("PP2", "Llama"), ("TP1PP1", "biases"), ("TP1PP1", "LayerNorm")])
def test_modelopt_keeps_the_same(ranks, layout, kind):
    for result in ranks(Topology.from_name(layout).world_size).run(_modelopt_against_ours, layout, kind):
        assert result["names"]
        assert result["values"]
        assert result["logits"] < TOLERANCE


def _no_data(_model):
    raise AssertionError("no calibration with saved scores")


def _from_file(name, spec, path, save):
    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.testing import pruning as testing
    from nemo_opt.training.forward import forward_loop

    chunks = testing.contrasted_model(Topology.from_name(name), SMALL, spec)
    targets = {f"target_{name}": size for name, size in TARGETS.items()}
    if save:
        prune_language_model(chunks, targets, forward_loop(testing.batches(count=4), description="test"), save_scores=path)
    else:
        prune_language_model(chunks, targets, _no_data, scores=path)
    return testing.whole_weights(chunks)


@pytest.mark.ranks
def test_scores_saved_at_one_layout_prune_at_another(ranks, alone, tmp_path):
    path = str(tmp_path / "scores.safetensors")
    for layout, spec, save in (("TP2", "te", True), ("PP2", "local", False), ("TP1PP1", "te", False)):
        weights = ranks(Topology.from_name(layout).world_size).run(_from_file, layout, spec, path, save)[0]
        assert _equal(weights, alone["dense", "te"]["weights"])


def _reload(name, path, spec):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.models.build import model_config_of
    from nemo_opt.parallel import initialize
    from nemo_opt.testing import pruning as testing

    topology = initialize(Topology.from_name(name))
    chunks, info = restore_model(path, topology, spec=spec)
    assert info.model == model_config_of(chunks[0])
    assert not info.has_modelopt_state
    return testing.whole_weights(chunks), testing.logits(chunks, testing.batches(count=4))


@pytest.mark.ranks
@pytest.mark.parametrize(("saved_at", "loaded_at"), [("TP2", "TP1PP1"), wide("PP2", "TP2")])
def test_what_is_saved_at_one_layout_loads_at_another(ranks, alone, tmp_path, saved_at, loaded_at):
    ranks(2).run(_prune, saved_at, ["dense"], TE, str(tmp_path))
    loaded = ranks(Topology.from_name(loaded_at).world_size).run(_reload, loaded_at, f"{tmp_path}/{saved_at}_dense_te", "local")[0]
    assert _equal(loaded[0], alone["dense", "te"]["weights"])
    assert _difference(loaded[1], alone["dense", "te"]["logits"]) < TOLERANCE


def _train_on(name):
    """Losses of a few steps of plain gradient descent on one batch, after pruning."""
    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.testing import pruning as testing

    (model,) = testing.contrasted_model(Topology.from_name(name), SMALL, "te")
    (batch,) = testing.batches(count=1)
    model.decoder.layers[0].mlp.linear_fc2.weight.requires_grad_(False)
    targets = {f"target_{name}": size for name, size in TARGETS.items()} | {"target_num_layers": 4}
    prune_language_model(model, targets, lambda m: m(batch["tokens"], batch["position_ids"], None))
    assert [p.requires_grad for layer in model.decoder.layers for p in layer.mlp.linear_fc2.parameters()] == [False, True, True, True]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["tokens"].roll(-1, dims=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP1", wide("TP2")])
def test_pruned_model_trains_on(ranks, layout):
    losses = ranks(Topology.from_name(layout).world_size).run(_train_on, layout)[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def _prune_wrapped():
    """A half-precision model inside its wrapper, with one parameter in full precision and a hook of the caller's."""
    from megatron.core.transformer.module import Float16Module

    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize
    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.testing import pruning as testing

    initialize(Topology())
    (model,) = build_model(SMALL, Topology(), spec="local", dtype=torch.bfloat16)
    wrapped = Float16Module(model.config, model)
    norm = model.decoder.layers[3].input_layernorm
    norm.weight.data = norm.weight.data.float()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (batch,) = testing.batches(count=1)

    def loop(gpt_model):
        gpt_model(batch["tokens"], batch["position_ids"], None)

    model.eval()
    assert prune_language_model([wrapped], {"target_hidden_size": 16, "target_num_layers": 4}, loop)[0] is wrapped
    assert wrapped.module is model
    assert not model.training
    assert not model.decoder.layers[0].training
    assert wrapped.config is model.config is model.decoder.config
    loop(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return len(calls), [name for name, dtype in dtypes.items() if dtype != torch.bfloat16]


@pytest.mark.ranks
def test_wrapped_models_are_pruned_in_place_and_keep_their_dtypes(ranks):
    calls, full_precision = ranks(1).run(_prune_wrapped)[0]
    assert calls == 2
    assert full_precision == ["decoder.layers.3.input_layernorm.weight"]


def _digests():
    from nemo_opt.prune.digest import weights_digest
    from nemo_opt.testing import pruning as testing

    def changed(change):
        with torch.no_grad():
            before = weight.clone()
            change()
            result = weights_digest(model)
            weight.copy_(before)
        return result

    (model,) = testing.contrasted_model(Topology(), SMALL, "local")
    weight = model.decoder.layers[0].mlp.linear_fc2.weight
    plain = weights_digest(model)
    others = [
        changed(lambda: weight[0, 0].neg_()),
        changed(lambda: weight.copy_(weight.roll(1, dims=0))),
        changed(lambda: weight.copy_(weight.roll(1, dims=1))),
        changed(lambda: weight.add_(torch.eye(32, 48) * 1e-6)),
    ]
    return plain, weights_digest(model), others


@pytest.mark.ranks
def test_digest_tells_weights_apart(ranks):
    plain, again, others = ranks(1).run(_digests)[0]
    assert again == plain
    assert len({plain, *others}) == 5


def _refuse():
    """Nothing is changed by a loop that shows nothing or fails, nor in a model with weights that pruning does not know."""
    from unittest.mock import patch

    from nemo_opt.errors import DataError
    from nemo_opt.models.build import model_config_of
    from nemo_opt.prune import slicing
    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.testing import pruning as testing

    def refused(kind, config, loop=None):
        with pytest.raises(kind) as caught:
            prune_language_model(model, config, loop)
        messages.append(str(caught.value))

    (model,) = testing.contrasted_model(Topology(), SMALL, "local")
    before, settings, messages = testing.whole_weights([model]), dict(vars(model.config)), []
    refused(DataError, {"target_hidden_size": 8}, lambda _: None)
    refused(ZeroDivisionError, {"target_hidden_size": 8}, lambda _: 1 / 0)
    with patch.object(slicing, "rebuilt", side_effect=MemoryError("no room")):
        refused(MemoryError, {"drop_layers": [1]})
    mlp = model.decoder.layers[1].mlp
    weight = mlp.linear_fc2.weight
    mlp.linear_fc2.weight = torch.nn.Parameter(torch.ones(16, 48))
    refused(ConfigError, {"drop_layers": [1]})
    mlp.linear_fc2.weight = weight
    for holder, name in ((model, "extra"), (mlp, "extra")):
        holder.add_module(name, torch.nn.Linear(2, 2, bias=False))
        refused(ConfigError, {"drop_layers": [1]})
        delattr(holder, name)
    assert _equal(testing.whole_weights([model]), before)
    assert vars(model.config) == settings
    assert model_config_of(model) == SMALL
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return messages


@pytest.mark.ranks
def test_models_stay_as_they_are_when_they_cannot_be_pruned(ranks):
    silent, _, _, shape, outside, inside = ranks(1).run(_refuse)[0]
    assert silent.startswith("layers [1, 2, 3, 4] have seen no data")
    assert shape.startswith("decoder.layers.1.mlp.linear_fc2.weight has the shape (16, 48), pruning expects (32, 48)")
    assert outside.startswith("extra.weight is no weight that pruning knows")
    assert inside.startswith("decoder.layers.1.mlp.extra.weight is no weight that pruning knows")
