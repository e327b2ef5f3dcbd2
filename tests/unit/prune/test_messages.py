"""Every refusal in full: users act on these sentences, so they must name both sides and the remedy."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import nemo_opt._stack

import pytest
import torch
from safetensors.torch import save_file

from nemo_opt.errors import CheckpointError, ConfigError, DataError
from nemo_opt.models.config import preset
from nemo_opt.prune import pruner, scores_file
from nemo_opt.prune.candidates import candidates
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores

TINY = preset("tiny")  # 4 layers, hidden 128, ffn 256, 8 heads in 4 groups
MIXTURE = TINY.with_(num_moe_experts=8)
HEADS = "(target_num_query_groups prunes the groups)"


def refusal(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_layers": [1], "target_num_layers": 2}, "drop_layers cannot be used with other pruning parameters"),
        (
            {"target_params": 5, "target_active_params": 4, "target_num_layers": 2, "target_num_query_groups": 2},
            (
                "['target_num_layers', 'target_num_query_groups'] fix sizes that a search by ['active_params', 'params'] would find: "
                "give one or the other; search.hparams_to_skip keeps a size as it is"
            ),
        ),
        (
            {"target_mamba_num_heads": 2},
            "target_mamba_num_heads is for Mamba layers; only GPT models are pruned here, leave it out",
        ),
        ({"target_hidden_size": "x"}, "target_hidden_size must be a positive integer, got 'x'"),
        ({"target_memory_mb": "x"}, "target_memory_mb must be a positive number, got 'x'"),
        ({"drop_layers": "12"}, "drop_layers must be a list of layer numbers, got '12'"),
        ({"drop_layers": []}, "drop_layers is given but empty: name the layers to drop, counted from 1, or leave it out"),
        ({"drop_layers": [1, 0, -2]}, "drop_layers [0, -2] out of range: layers are counted from 1"),
        ({"drop_layers": [2, 1, 2]}, "drop_layers [2, 1, 2] names a layer twice"),
        ({"search": 3}, "search is read from a SearchSpace or a mapping, got int"),
        ({"search": {"max_width_pruning": "x"}}, "max_width_pruning must be a share in (0, 1], got 'x'"),
        ({"search": {"max_depth_pruning": True}}, "max_depth_pruning must be a share in (0, 1], got True"),
        ({"search": {"batch_size": "x"}}, "batch_size must be a positive integer, got 'x'"),
        ({"search": {"num_moe_experts_divisor": True}}, "num_moe_experts_divisor must be a positive integer or None, got True"),
        ({"search": {"hparams_to_skip": 3}}, "hparams_to_skip must be a list of sizes, got 3"),
        (
            {"search": {"hparams_to_skip": ["num_layers", "vocab_size"]}},
            (
                "hparams_to_skip ['vocab_size'] are not searched; those are "
                "['hidden_size', 'ffn_hidden_size', 'num_attention_heads', 'num_moe_experts', 'num_layers']"
            ),
        ),
    ],
)
def test_settings(settings, message):
    assert refusal(ConfigError, lambda: PruningConfig(**settings)) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "PruningConfig is read from a dataclass or a mapping, got list"),
        ({"z": 1, 5: 1, "search": {}}, "unknown pruning settings ['5', 'z']; known are ['target_ffn_hidden_size', 'target_hidden_size', "),
        ({"search": {"z": 1, 5: 1}}, "unknown search settings ['5', 'z']; known are ['max_width_pruning', 'max_depth_pruning', "),
    ],
)
def test_unknown_settings(values, message):
    assert refusal(ConfigError, lambda: PruningConfig.from_any(values)).startswith(message)


def unreachable(name, target, size, reason, nearest):
    return f"target_{name} {target} cannot be reached from {name} {size}: it is at most that{reason}; nearest: {nearest}"


@pytest.mark.parametrize(
    ("settings", "model", "layout", "message"),
    [
        ({}, TINY, {}, "nothing to prune: give at least one target_* size, or drop_layers"),
        ({"drop_layers": [1, 5, 7]}, TINY, {}, "drop_layers [5, 7] out of range: the model has layers 1..4"),
        ({"drop_layers": [1, 2, 3, 4]}, TINY, {}, "drop_layers names all 4 layers: keep at least one"),
        ({"target_num_moe_experts": 4}, TINY, {}, "target_num_moe_experts 4 is for mixtures of experts; the model is dense"),
        ({"target_hidden_size": 129}, TINY, {"tp": 2}, unreachable("hidden_size", 129, 128, "", "128")),
        ({"target_num_layers": 5}, TINY, {"tp": 2}, unreachable("num_layers", 5, 4, "", "4")),
        ({"target_ffn_hidden_size": 257}, TINY, {}, unreachable("ffn_hidden_size", 257, 256, "", "256")),
        ({"target_ffn_hidden_size": 1}, TINY, {"tp": 2}, unreachable("ffn_hidden_size", 1, 256, " and is a multiple of tp 2", "2")),
        ({"target_num_query_groups": 5}, TINY, {}, unreachable("num_query_groups", 5, 4, "", "4")),
        (
            {"target_num_query_groups": 3},
            TINY,
            {"tp": 2},
            unreachable("num_query_groups", 3, 4, " and is a multiple or a divisor of tp 2", "2 or 4"),
        ),
        (
            {"target_num_query_groups": 1},
            TINY,
            {"tp": 4},
            "target_num_query_groups 1 leaves 2 heads, 2 % tp 4 != 0: choose other groups or a tp",
        ),
        (
            {"target_num_attention_heads": 3, "target_num_query_groups": 1},
            TINY,
            {"tp": 2},
            unreachable(
                "num_attention_heads",
                3,
                8,
                f" and is a multiple of the 1 query groups that stay, which have 2 heads and a multiple of tp 2 {HEADS}",
                "2",
            ),
        ),
        (
            {"target_num_attention_heads": 6},
            TINY,
            {},
            unreachable(
                "num_attention_heads", 6, 8, f" and is a multiple of the 4 query groups that stay, which have 8 heads {HEADS}", "4 or 8"
            ),
        ),
        (
            {"target_num_attention_heads": 4, "target_num_query_groups": 2},
            TINY,
            {"tp": 8},
            unreachable(
                "num_attention_heads",
                4,
                8,
                f" and is a multiple of the 2 query groups that stay, which have 4 heads and a multiple of tp 8 {HEADS}",
                "none",
            ),
        ),
        (
            {"target_num_moe_experts": 1},
            MIXTURE,
            {},
            unreachable("num_moe_experts", 1, 8, " and is at least moe_router_topk 2", "2"),
        ),
        (
            {"target_num_moe_experts": 5},
            MIXTURE,
            {"ep": 4},
            unreachable("num_moe_experts", 5, 8, " and is at least moe_router_topk 2 and a multiple of ep 4", "4 or 8"),
        ),
        (
            {"target_params": 1e7, "target_memory_mb": 100},
            TINY,
            {},
            "nothing to prune: the model is within the limits already (params 1,115,264 <= 10,000,000, memory_mb 6.127197266 <= 100)",
        ),
    ],
)
def test_targets(settings, model, layout, message):
    assert refusal(ConfigError, lambda: PruningConfig(**settings).check_against(model, **layout)) == message


def test_limits_that_nothing_fits():
    config = PruningConfig(target_params=1000, target_memory_mb=0.5)
    assert refusal(ConfigError, lambda: candidates(TINY, config)) == (
        "no architecture of the search space fits params <= 1,000, memory_mb <= 0.5; the smallest there have "
        "params 604,880, memory_mb 5.153717041: raise the limit, max_width_pruning 0.4 or max_depth_pruning 0.2"
    )


def test_ranks_that_can_split_nothing():
    assert refusal(ConfigError, lambda: candidates(TINY, PruningConfig(target_params=1e6), tp=3, ep=2)) == (
        "tp 3 and ep 2 can split no architecture of the search space: choose other divisors, or another layout"
    )


def header(**changes):
    return {"format": "nemo_opt.importance_scores", "version": 1, "model": {}, "tokens": 1, "digest": ""} | changes


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (header(version=2), "{} has version 2, this nemo_opt reads 1: measure again"),
        (header(format="x"), "{} holds no importance scores: its format is 'x', expected 'nemo_opt.importance_scores'"),
        (header(tokens=None, digest=3), "{} is damaged: ['tokens', 'digest'] are missing or of the wrong type"),
    ],
)
def test_files_of_scores(tmp_path, facts, message):
    path = tmp_path / "scores"
    save_file({"hidden": torch.ones(1)}, path, metadata={"nemo_opt": json.dumps(facts)})
    assert refusal(CheckpointError, lambda: scores_file.read_scores_file(path)) == message.format(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "scores"
    assert refusal(CheckpointError, lambda: scores_file.read_scores_file(path)) == f"there are no importance scores at {path}: no such file"
    path.write_bytes(b"nothing")
    text = refusal(CheckpointError, lambda: scores_file.read_scores_file(path))
    assert text.startswith(f"{path} is damaged, no safetensors file with importance scores: ")
    assert refusal(CheckpointError, lambda: scores_file.write_scores_file(tmp_path, {}, {})) == (
        f"{tmp_path} is a directory; importance scores are one file: choose another path"
    )


def test_scores_of_another_model():
    nothing = torch.ones(0)
    scores = ImportanceScores(hidden=nothing, ffn={}, heads={}, groups={}, layers=nothing, model=TINY, tokens=1, digest="")
    assert refusal(ConfigError, lambda: scores.check_model(TINY.with_(num_layers=3, ffn_hidden_size=8))) == (
        "the scores were measured on a model with {'num_layers': 4, 'ffn_hidden_size': 256}, "
        "this one has {'num_layers': 3, 'ffn_hidden_size': 8}: measure this model's importance"
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            {"converted": True},
            ConfigError,
            "the model is already converted by ModelOpt (quantized or distilled): prune it before that",
        ),
        (
            {"vp": 2},
            ConfigError,
            "pruning needs one model chunk a rank, this pipeline is interleaved (vp > 1): load the checkpoint at vp=1",
        ),
        (
            {"config": {"target_params": 5, "target_memory_mb": 0.1}},
            ConfigError,
            "a search by ['memory_mb', 'params'] chooses the best candidate by a score: pass score_function",
        ),
        (
            {"config": {"drop_layers": [1]}, "scores": "file"},
            ConfigError,
            "drop_layers names the layers, so nothing is measured: leave scores and save_scores out",
        ),
        (
            {},
            DataError,
            "importance is measured on data: pass data_module (a forward loop, micro-batches, or a data module), or scores",
        ),
        (
            {"data": [1], "trainer": SimpleNamespace(limit_val_batches=0.5)},
            ConfigError,
            "trainer.limit_val_batches must be a positive number of batches, got 0.5",
        ),
    ],
)
def test_pruning(call, kind, message):
    model = MagicMock()
    model.config.virtual_pipeline_model_parallel_size = call.get("vp")
    model.config.tensor_model_parallel_size = model.config.expert_model_parallel_size = 1
    work = dict.fromkeys(("measure_importance", "weights_digest", "keep_layers", "slice_model"), MagicMock(side_effect=AssertionError))
    with (
        patch.multiple(pruner, unwrap=lambda _: model, model_config_of=lambda _: TINY, check_weights=lambda _: None, **work),
        patch.object(pruner.mto.ModeloptStateManager, "is_converted", return_value=call.get("converted", False)),
    ):
        text = refusal(
            kind,
            lambda: pruner.prune_language_model(
                model,
                call.get("config", {"target_num_layers": 2}),
                call.get("data"),
                call.get("trainer"),
                scores=call.get("scores"),
            ),
        )
    assert text == message


def test_saving_without_a_layout():
    assert refusal(ConfigError, lambda: pruner.save_pruned_model(None, "out")) == "no layout is set up: pass topology"
