"""Minitron pruning of a tiny model through ModelOpt, against an oracle that shares no code with it.

The oracle measures importance with plain hooks on the dense single-rank model and slices the weights by hand.
"""

import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig

SMALL = preset(
    "tiny",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)
TARGETS = {"hidden_size": 20, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 2}
TOLERANCE = 1e-5  # of the largest logit; float32 sums in another order differ by 1e-7 to 4e-7 (hand-sliced, reloaded at TP2 and PP2)


def _batches(count=3, batch=2, seq=16, vocab=128):
    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(seq).expand(batch, seq)
    return [{"tokens": torch.randint(0, vocab, (batch, seq), generator=generator), "position_ids": positions} for _ in range(count)]


def _spread(chunks):
    """Make channels, heads and layers matter differently: a fresh model's are alike, and top-k would be a matter of rounding."""
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in sorted(chunk.named_parameters()):
                if parameter.dim() == 1:
                    parameter.copy_(
                        torch.linspace(0.5, 1.5, parameter.numel())[torch.randperm(parameter.numel(), generator=_generator(name))]
                    )
                else:
                    parameter.mul_(5.0)


def _generator(name):
    return torch.Generator().manual_seed(sum(map(ord, re.sub(r"layers\.\d+", "layers", name))))


def _model(topology, config=SMALL, spec="te"):
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import current_topology, initialize

    if current_topology() is None:
        initialize(topology)
    chunks = build_model(config, topology, spec=spec, seed=5)
    _spread(chunks)
    return chunks


def _logits(chunks, batches=None):
    """Logits [batches * B, S, V] on every rank, through mcore's schedule; vocabulary shards are put together."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batches = batches or _batches()
    collected = []

    def step(iterator, model):
        batch = next(iterator)
        return model(batch["tokens"], batch["position_ids"], None), lambda output: (collected.append(output), (output.new_zeros(()), {}))[1]

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            seq_length=batches[0]["tokens"].shape[1],
            micro_batch_size=batches[0]["tokens"].shape[0],
            forward_only=True,
        )
    shards = [None] * dist.get_world_size()
    dist.all_gather_object(shards, (parallel_state.get_tensor_model_parallel_rank(), torch.cat(collected) if collected else None))
    return torch.cat([shard for _, shard in sorted((s for s in shards if s[1] is not None), key=lambda s: s[0])], dim=-1)


class Oracle:
    """Importance by plain hooks on a dense model, after the Minitron paper: over the batch the L2 norm of mean |activation|."""

    def __init__(self, model):
        self.hidden = torch.zeros(model.config.hidden_size)
        self.ffn, self.heads, self.layers = {}, {}, {}
        squares, hooks = {}, []
        for number, layer in enumerate(model.decoder.layers):
            attention, mlp = layer.self_attention, layer.mlp
            for kind, linear in (("qkv", attention.linear_qkv), ("fc1", mlp.linear_fc1)):
                hooks.append(
                    linear.register_forward_pre_hook(self._normed(squares, (number, kind), linear, model.config.layernorm_epsilon))
                )
            hooks.append(mlp.linear_fc2.register_forward_pre_hook(self._input(squares, (number, "fc2"))))
            hooks.append(attention.linear_proj.register_forward_pre_hook(self._input(squares, (number, "proj"))))
            hooks.append(layer.register_forward_hook(self._change(number), with_kwargs=True))
        _logits([model])
        for hook in hooks:
            hook.remove()
        for (number, kind), square in squares.items():
            if kind in ("qkv", "fc1"):
                self.hidden += square.sqrt()
            elif kind == "fc2":
                self.ffn[number] = square.sqrt()
            else:
                self.heads[number] = square.view(model.config.num_attention_heads, -1).sum(dim=1).sqrt()

    @staticmethod
    def _add(squares, key, x):
        squares[key] = squares.get(key, 0) + x.abs().mean(dim=0).pow(2).sum(dim=0)

    def _normed(self, squares, key, linear, epsilon):
        def hook(module, args):
            x = args[0]
            self._add(squares, key, x * (x.pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt() * linear.layer_norm_weight)

        return hook

    def _input(self, squares, key):
        return lambda module, args: self._add(squares, key, args[0])

    def _change(self, number):
        def hook(module, args, kwargs, output):
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cosine = torch.nn.functional.cosine_similarity(before, output[0], dim=-1)
            self.layers[number] = self.layers.get(number, 0.0) + float(1 - cosine.mean())

        return hook

    def kept(self, targets, groups):
        top = lambda scores, count: sorted(scores.argsort(descending=True)[:count].tolist())  # noqa: E731
        layers = sorted(sorted(self.layers, key=self.layers.get, reverse=True)[: targets["num_layers"]])
        hidden = top(self.hidden, targets["hidden_size"])
        ffn = [top(self.ffn[n], targets["ffn_hidden_size"]) for n in layers]
        heads = []
        for n in layers:
            scores = self.heads[n].view(groups, -1)
            heads.append([top(group, targets["num_attention_heads"] // groups) for group in scores])
        return SimpleNamespace(layers=layers, hidden=hidden, ffn=ffn, heads=heads)


def _slice_by_hand(dense, small, kept, config):
    """Copy the kept rows and columns of `dense` into the freshly built `small`."""
    d, groups = config.head_dim, config.num_query_groups
    per_group = config.num_attention_heads // groups
    hidden = torch.tensor(kept.hidden)
    with torch.no_grad():
        small.embedding.word_embeddings.weight.copy_(dense.embedding.word_embeddings.weight[:, hidden])
        small.output_layer.weight.copy_(dense.output_layer.weight[:, hidden])
        small.decoder.final_layernorm.weight.copy_(dense.decoder.final_layernorm.weight[hidden])
        for to, number, ffn, heads in zip(small.decoder.layers, kept.layers, kept.ffn, kept.heads, strict=True):
            source = dense.decoder.layers[number]
            qkv = source.self_attention.linear_qkv.weight.view(groups, per_group + 2, d, -1)[..., hidden]
            rows = [torch.cat([qkv[g, heads[g]], qkv[g, per_group:]]) for g in range(groups)]
            to.self_attention.linear_qkv.weight.copy_(torch.stack(rows).reshape(-1, len(hidden)))
            to.self_attention.linear_qkv.layer_norm_weight.copy_(source.self_attention.linear_qkv.layer_norm_weight[hidden])
            proj = source.self_attention.linear_proj.weight.view(-1, groups, per_group, d)[hidden]
            to.self_attention.linear_proj.weight.copy_(
                torch.stack([proj[:, g, heads[g]] for g in range(groups)], dim=1).reshape(len(hidden), -1)
            )
            gate, up = source.mlp.linear_fc1.weight.chunk(2)
            to.mlp.linear_fc1.weight.copy_(torch.cat([gate[ffn], up[ffn]])[:, hidden])
            to.mlp.linear_fc1.layer_norm_weight.copy_(source.mlp.linear_fc1.layer_norm_weight[hidden])
            to.mlp.linear_fc2.weight.copy_(source.mlp.linear_fc2.weight[:, ffn][hidden])
    return small


def _prune_and_compare_with_hand_slices():
    from nemo_opt.models.build import build_model, model_config_of
    from nemo_opt.prune.pruner import prune_language_model

    chunks = _model(Topology())
    oracle = Oracle(chunks[0])
    kept = oracle.kept(TARGETS, SMALL.num_query_groups)
    pruned_config = SMALL.with_(**TARGETS, kv_channels=SMALL.head_dim)
    expected = _slice_by_hand(chunks[0], build_model(pruned_config, Topology(), spec="te", seed=None)[0], kept, SMALL)
    reference = _logits([expected])
    fc2_dense = {n: chunks[0].decoder.layers[n].mlp.linear_fc2.weight.detach().clone() for n in kept.layers}
    prune_language_model(chunks, PruningConfig(**{f"target_{k}": v for k, v in TARGETS.items()}), _batches())
    columns = []
    for layer, n, ffn in zip(chunks[0].decoder.layers, kept.layers, kept.ffn, strict=True):
        wanted = {tuple(sorted(column)) for column in fc2_dense[n][:, ffn][kept.hidden].t().tolist()}
        columns.append({tuple(sorted(column)) for column in layer.mlp.linear_fc2.weight.t().tolist()} == wanted)
    return {
        "difference": float((_logits(chunks) - reference).abs().max() / reference.abs().max()),
        "config": model_config_of(chunks[0]),
        "expected_config": pruned_config,
        "kept_columns": columns,
        "type": type(chunks[0]).__name__,
    }


@pytest.mark.ranks
def test_kept_channels_heads_and_layers_are_the_most_important_ones(ranks):
    result = ranks(1).run(_prune_and_compare_with_hand_slices)[0]
    assert result["difference"] < TOLERANCE
    assert result["kept_columns"] == [True, True]
    assert result["config"].to_dict() == result["expected_config"].to_dict()
    assert result["type"] == "GPTModel"


def _prune(topology, folder=None, config=SMALL, targets=TARGETS):
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

    chunks = _model(topology, config)
    before = _marks(chunks[0])
    prune_language_model(chunks, {f"target_{k}": v for k, v in targets.items()}, _batches())
    after = _marks(chunks[0])
    if folder:
        save_pruned_model(chunks, folder)
    return {"logits": _logits(chunks), "marks": all(after[name] == before[name] for name in after), "layers": len(chunks[0].decoder.layers)}


def _marks(model):
    plain = (bool, int, str)
    return {
        re.sub(r"layers\.\d+", "layers", name): (p.requires_grad, {k: v for k, v in vars(p).items() if isinstance(v, plain)})
        for name, p in model.named_parameters()
    }


def _reload(topology, folder):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.models.build import model_config_of
    from nemo_opt.parallel import initialize

    initialize(topology)
    chunks, info = restore_model(folder, topology, spec="te")
    return {"logits": _logits(chunks), "config": info.model, "actual": model_config_of(chunks[0]), "modelopt": info.has_modelopt_state}


@pytest.mark.ranks
def test_pipeline_stages_prune_as_one_rank_does_and_reload_anywhere(ranks, tmp_path):
    one = ranks(1).run(_prune, Topology())[0]
    two = ranks(2).run(_prune, Topology(pp=2), str(tmp_path / "pruned"))
    assert sum(rank["layers"] for rank in two) == 2
    assert all(rank["marks"] for rank in [one, *two])
    scale = one["logits"].abs().max()
    assert (two[0]["logits"] - one["logits"]).abs().max() < TOLERANCE * scale
    for topology in (Topology(), Topology(tp=2), Topology(pp=2)):
        loaded = ranks(topology.world_size).run(_reload, topology, str(tmp_path / "pruned"))[0]
        assert (loaded["logits"] - one["logits"]).abs().max() < TOLERANCE * scale, topology.name
        assert loaded["config"] == loaded["actual"] == SMALL.with_(**TARGETS, kv_channels=SMALL.head_dim)
        assert not loaded["modelopt"]


def _tied():
    return SMALL.with_(tie_embeddings=True)


@pytest.mark.ranks
def test_tied_embeddings_are_pruned_together(ranks):
    one = ranks(1).run(_prune, Topology(), None, _tied())[0]
    two = ranks(2).run(_prune, Topology(pp=2), None, _tied())[0]
    assert (two["logits"] - one["logits"]).abs().max() < TOLERANCE * one["logits"].abs().max()


def _train_on():
    """Losses of a few steps of plain gradient descent on one batch, after pruning."""
    from nemo_opt.prune.pruner import prune_language_model

    (model,) = _model(Topology())
    prune_language_model(model, {f"target_{k}": v for k, v in TARGETS.items()}, _batches())
    model.train()
    (batch,) = _batches(count=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["tokens"].roll(-1, dims=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.ranks
def test_pruned_model_trains_on(ranks):
    losses = ranks(1).run(_train_on)[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def _prune_each(cases):
    return [_prune_randomly(*case) for case in cases]


def _prune_randomly(hidden, ffn, heads, layers):
    """Whether the result has exactly the target sizes, or a ConfigError left the model as it was."""
    from nemo_opt.models.build import model_config_of
    from nemo_opt.prune.pruner import prune_language_model

    (model,) = _model(Topology())
    given = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads, "num_layers": layers}
    targets = {name: size for name, size in given.items() if size is not None}
    valid = targets and all(size <= getattr(SMALL, name) for name, size in targets.items()) and (heads is None or heads % 2 == 0)
    try:
        prune_language_model(model, {f"target_{name}": size for name, size in targets.items()}, _batches(count=1))
    except ConfigError:
        return not valid and model_config_of(model) == SMALL
    sizes = SMALL.to_dict() | targets
    true = model_config_of(model)
    return (
        bool(valid)
        and {**true.to_dict(), "kv_channels": true.head_dim} == {**sizes, "kv_channels": 4}
        and bool(_logits([model]).isfinite().all())
    )


_TARGETS = st.tuples(*(st.none() | st.integers(1, highest + 1) for highest in (32, 48, 8, 4)))


@pytest.mark.ranks
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=st.lists(_TARGETS, min_size=3, max_size=6))
def test_any_target_gives_its_shapes_or_a_named_error(ranks, cases):
    assert all(ranks(1).run(_prune_each, cases)[0])


def _config(**changes):
    sizes = {
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
    }
    return SimpleNamespace(config=SimpleNamespace(**(sizes | changes)))


@pytest.mark.parametrize(
    ("changes", "dp", "named"),
    [
        ({"tensor_model_parallel_size": 2}, 1, "{'tp': 2}"),
        ({"context_parallel_size": 2}, 1, "{'cp': 2}"),
        ({"expert_model_parallel_size": 2}, 1, "{'ep': 2}"),
        ({"virtual_pipeline_model_parallel_size": 2}, 1, "{'vp': 2}"),
        ({}, 2, "{'dp': 2}"),
    ],
)
def test_other_parallelism_is_refused_by_name(changes, dp, named):
    from nemo_opt.prune import minitron

    with (
        patch.object(minitron.parallel_state, "get_data_parallel_world_size", return_value=dp),
        patch.object(minitron.dist, "get_world_size", return_value=2),
        patch.object(minitron, "spec_of", return_value="te"),
        pytest.raises(ConfigError, match=re.escape(named)),
    ):
        minitron.check_layout(_config(**changes))


def test_local_spec_is_refused_by_name():
    from nemo_opt.prune import minitron

    with (
        patch.object(minitron.parallel_state, "get_data_parallel_world_size", return_value=1),
        patch.object(minitron, "spec_of", return_value="local"),
        pytest.raises(ConfigError, match="spec 'te'"),
    ):
        minitron.check_layout(_config())


def test_only_query_groups_that_stay_means_nothing_to_do():
    from nemo_opt.prune import minitron

    with patch.object(minitron.mtp, "prune") as prune:
        minitron.prune_to(_config(), {"num_query_groups": 2}, lambda model: None)
    prune.assert_not_called()
