"""Any small architecture and any targets: the model has exactly the sizes asked for and still computes, or an error names the setting."""

import nemo_opt._stack

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import build_model, model_config_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology, parallel
from nemo_opt.prune.importance import measure_importance
from nemo_opt.prune.pruner import prune_language_model
from nemo_opt.testing import pruning as testing
from nemo_opt.training.forward import forward_loop

SIZES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers", "num_moe_experts")


@st.composite
def cases(draw, tp=1):
    """An architecture that `tp` ranks can hold, a layer spec, and targets of which some cannot be reached."""
    groups = draw(st.sampled_from([1, 2, 4] if tp == 1 else [2, 4]))
    model = ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=4 * draw(st.integers(2, 8)),
        ffn_hidden_size=tp * draw(st.integers(1, 20)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 4, 8])),
        num_moe_experts=draw(st.sampled_from([None, None, 2, 3])) if tp == 1 else None,
        tie_embeddings=draw(st.booleans()),
        vocab_size=128,
        max_position_embeddings=64,
    )
    targets = {}
    for name in SIZES:
        size = getattr(model, name)
        if draw(st.booleans()) and (size is not None or draw(st.booleans())):
            # half of them within the model: else hardly any case would be pruned at all
            targets[name] = draw(st.integers(1, size or 2) | st.integers(1, (size or 2) + 1))
    return model, draw(st.sampled_from(["local", "te"])), targets


def is_valid(model, targets, tp):
    """The rules of docs/pruning.md, said once more."""
    if not targets or any(getattr(model, name) is None or size > getattr(model, name) for name, size in targets.items()):
        return False
    per_group = model.num_attention_heads // model.num_query_groups
    groups = targets.get("num_query_groups", model.num_query_groups)
    heads = targets.get("num_attention_heads", groups * per_group)
    ffn = targets.get("ffn_hidden_size", model.ffn_hidden_size)
    return (
        (groups % tp == 0 or tp % groups == 0)
        and heads % groups == heads % tp == ffn % tp == 0
        and heads <= groups * per_group
        and targets.get("num_moe_experts", model.moe_router_topk) >= model.moe_router_topk
    )


def expected_sizes(model, targets):
    """What remains; a head keeps its channels."""
    groups = targets.get("num_query_groups", model.num_query_groups)
    heads = groups * model.num_attention_heads // model.num_query_groups
    return model.to_dict() | {"num_attention_heads": heads} | targets | {"kv_channels": model.head_dim}


def check(topology, model, spec, targets):
    """Prunes one case; whether it could be."""
    chunks = testing.contrasted_model(topology, model, spec)
    shown = testing.batches(count=1)
    scores = measure_importance(chunks, forward_loop(shown, description="test"))
    before = [parameter.shape for parameter in chunks[0].parameters()]
    config = {f"target_{name}": size for name, size in targets.items()}
    if not is_valid(model, targets, topology.tp):
        with pytest.raises(ConfigError, match="|".join(config) or "nothing to prune"):
            prune_language_model(chunks, config, scores=scores)
        assert [parameter.shape for parameter in chunks[0].parameters()] == before
        return False
    prune_language_model(chunks, config, scores=scores)
    pruned = model_config_of(chunks[0])
    assert pruned.to_dict() | {"kv_channels": pruned.head_dim} == expected_sizes(model, targets)
    # What pruning left is what a model of these sizes is built of.
    [built] = build_model(pruned, topology, spec=spec, seed=1)
    shapes = [{name: parameter.shape for name, parameter in one.named_parameters()} for one in (chunks[0], built)]
    assert shapes[0] == shapes[1]
    assert bool(torch.isfinite(testing.logits(chunks, shown)).all())
    return True


@pytest.fixture(scope="module")
def one_rank():
    with parallel(Topology()) as topology:
        yield topology


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_model_and_target_on_one_rank(one_rank, case):
    check(one_rank, *case)


def _check_each(name, drawn):
    with parallel(Topology.from_name(name)) as topology:
        return [check(topology, *case) for case in drawn]


@pytest.mark.ranks
@pytest.mark.wide
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(cases(tp=2), min_size=5, max_size=8))
def test_any_model_and_target_on_two_ranks(ranks, drawn):
    one, other = ranks(2).run(_check_each, "TP2", drawn)
    assert one == other
