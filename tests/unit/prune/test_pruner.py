"""Every branch of prune_language_model with the work replaced: what is refused, in which order, and what is passed on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

HERE = "nemo_opt.prune.pruner"


@pytest.fixture
def patched():
    """A tiny model that is only announced; what would be done to it is recorded."""
    gpt_model = MagicMock()
    gpt_model.config = SimpleNamespace(
        virtual_pipeline_model_parallel_size=None, tensor_model_parallel_size=1, expert_model_parallel_size=1
    )
    scores = MagicMock(spec=ImportanceScores, digest="these weights")
    with (
        patch(f"{HERE}.unwrap", return_value=gpt_model),
        patch(f"{HERE}.mto.ModeloptStateManager.is_converted", return_value=False) as is_converted,
        patch(f"{HERE}.model_config_of", return_value=preset("tiny")),
        patch(f"{HERE}.measure_importance", return_value=scores) as measure,
        patch(f"{HERE}.select", return_value="selected") as select,
        patch(f"{HERE}.keep_layers", return_value="all but some") as keep_layers,
        patch(f"{HERE}.slice_model") as slice_model,
        patch(f"{HERE}.check_weights") as check_weights,
        patch(f"{HERE}.weights_digest", return_value="these weights") as digest,
        patch(f"{HERE}.dist.get_rank", return_value=0) as rank,
        patch(f"{HERE}.forward_loop", side_effect=lambda batches, description: list(batches)) as forward_loop,
        patch(f"{HERE}.save_checkpoint") as save_checkpoint,
    ):
        yield SimpleNamespace(**locals())


def untouched(patched):
    return not (patched.slice_model.called or patched.measure.called or patched.forward_loop.called)


def test_layers_are_dropped_without_data(patched):
    model = object()
    assert prune_language_model(model, PruningConfig(drop_layers=[2])) is model
    patched.keep_layers.assert_called_once_with(preset("tiny"), (2,))
    patched.slice_model.assert_called_once_with(patched.gpt_model, "all but some")
    patched.measure.assert_not_called()


@pytest.mark.parametrize("scores", [{"scores": "file"}, {"save_scores": "file"}])
def test_scores_are_refused_where_layers_are_named(patched, scores):
    with pytest.raises(ConfigError, match="nothing is measured"):
        prune_language_model(object(), PruningConfig(drop_layers=[2]), **scores)
    assert untouched(patched)


@pytest.mark.parametrize("config", [{"drop_layers": [2]}, {"target_num_layers": 2}])
def test_interleaved_pipelines_are_refused(patched, config):
    patched.gpt_model.config.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError, match="vp=1"):
        prune_language_model(object(), config, [1])
    assert untouched(patched)


def test_limits_are_refused_with_the_remedy(patched):
    with pytest.raises(ConfigError, match=r"search by \['params'\].*pass score_function"):
        prune_language_model(object(), {"target_params": 1000.0}, [1])
    assert untouched(patched)


@pytest.mark.parametrize(("axis", "config", "named"), [("tensor", {"target_ffn_hidden_size": 65}, "tp 2; nearest: 64 or 66")])
def test_sizes_that_ranks_cannot_share_are_refused(patched, axis, config, named):
    setattr(patched.gpt_model.config, f"{axis}_model_parallel_size", 2)
    with pytest.raises(ConfigError, match=named):
        prune_language_model(object(), config, [1])
    assert untouched(patched)


def test_experts_that_ranks_cannot_share_are_refused(patched):
    patched.gpt_model.config.expert_model_parallel_size = 4
    mixture = preset("tiny", num_moe_experts=8)
    with patch(f"{HERE}.model_config_of", return_value=mixture), pytest.raises(ConfigError, match="ep 4; nearest: 4 or 8"):
        prune_language_model(object(), {"target_num_moe_experts": 6}, [1])
    assert untouched(patched)


def test_a_score_function_is_for_limits_only(patched):
    with patch(f"{HERE}.search_architecture") as search:
        prune_language_model(object(), {"target_hidden_size": 64}, [1], score_function=len)
        search.assert_not_called()
        patched.select.assert_called_once_with(patched.scores, {"hidden_size": 64})
        model, config = object(), PruningConfig(target_params=1e5)
        search.return_value.best.sizes = {"num_layers": 3}
        prune_language_model(model, config, [1], score_function=len)
        search.assert_called_once_with(model, config, patched.scores, len)
    patched.select.assert_called_with(patched.scores, {"num_layers": 3})


def test_forward_loop_is_passed_on_and_what_is_best_stays(patched):
    def loop(model):
        raise AssertionError("measuring calls it, nobody else")

    model = object()
    assert prune_language_model(model, {"target_hidden_size": 64}, loop) is model
    patched.measure.assert_called_once_with(patched.gpt_model, loop)
    patched.select.assert_called_once_with(patched.scores, {"hidden_size": 64})
    patched.slice_model.assert_called_once_with(patched.gpt_model, "selected")
    patched.scores.save.assert_not_called()


def test_scores_replace_data_and_measuring(patched):
    given = MagicMock(spec=ImportanceScores, digest="these weights")
    prune_language_model(object(), {"target_hidden_size": 64}, scores=given, save_scores="again")
    patched.measure.assert_not_called()
    patched.forward_loop.assert_not_called()
    patched.select.assert_called_once_with(given, {"hidden_size": 64})
    given.save.assert_called_once_with("again")


def test_scores_are_read_from_a_file_and_checked(patched):
    with patch.object(ImportanceScores, "load", return_value=patched.scores) as load:
        patched.scores.check_model.side_effect = ConfigError("another model")
        with pytest.raises(ConfigError, match="another model"):
            prune_language_model(object(), {"target_hidden_size": 64}, scores="file")
    load.assert_called_once_with("file", model=preset("tiny"))
    assert untouched(patched)


@pytest.mark.parametrize(("digest", "rank", "warned"), [("these weights", 0, False), ("others", 0, True), ("others", 1, False)])
def test_scores_of_other_weights_are_used_with_a_warning(patched, caplog, digest, rank, warned):
    patched.rank.return_value = rank
    with caplog.at_level(logging.WARNING):
        prune_language_model(object(), {"target_hidden_size": 64}, scores=MagicMock(spec=ImportanceScores, digest=digest))
    assert ("measured on other weights" in caplog.text) == warned
    patched.slice_model.assert_called_once()


def test_scores_are_saved(patched):
    prune_language_model(object(), {"target_hidden_size": 64}, [1], save_scores="file")
    patched.scores.save.assert_called_once_with("file")


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize(("limit", "used"), [(None, [1, 2, 3]), (1, [1]), (2, [1, 2]), (9, [1, 2, 3])])
def test_batches_come_from_iterables_and_data_modules(patched, as_module, limit, used):
    data = SimpleNamespace(train_dataloader=lambda: iter([1, 2, 3])) if as_module else [1, 2, 3]
    trainer = None if limit is None else SimpleNamespace(limit_val_batches=limit)
    prune_language_model(object(), PruningConfig(target_num_layers=2), data, trainer)
    patched.measure.assert_called_once_with(patched.gpt_model, used)


@pytest.mark.parametrize("limit", [0, -1, 1.0, True, "2"])
def test_bad_limits_are_refused(patched, limit):
    with pytest.raises(ConfigError, match="limit_val_batches"):
        prune_language_model(object(), PruningConfig(target_num_layers=2), [1], SimpleNamespace(limit_val_batches=limit))
    assert untouched(patched)


def test_no_data_is_refused(patched):
    with pytest.raises(DataError, match="pass data_module"):
        prune_language_model(object(), PruningConfig(target_num_layers=2))
    assert untouched(patched)


def test_unreachable_target_is_refused_before_data(patched):
    with pytest.raises(ConfigError, match="nearest: 128"):
        prune_language_model(object(), PruningConfig(target_hidden_size=4096))
    assert untouched(patched)


@pytest.mark.parametrize("config", [{"drop_layers": [2]}, {"target_num_layers": 2}])
def test_unknown_weights_are_refused_before_data(patched, config):
    patched.check_weights.side_effect = ConfigError("no weight that pruning knows")
    with pytest.raises(ConfigError, match="no weight"):
        prune_language_model(object(), config, [1])
    patched.check_weights.assert_called_once_with(patched.gpt_model)
    assert untouched(patched)


def test_converted_model_is_refused(patched):
    patched.is_converted.return_value = True
    with pytest.raises(ConfigError, match="already converted"):
        prune_language_model(object(), PruningConfig(drop_layers=[1]))
    assert untouched(patched)


def test_saving_records_the_pruned_sizes(patched):
    assert save_pruned_model(object(), "out", topology=Topology(pp=2), tokenizer_dir="tok", extra={"a": 1}) == Path("out")
    patched.save_checkpoint.assert_called_once_with(
        "out",
        [patched.gpt_model],
        topology=Topology(pp=2),
        model_config=preset("tiny"),
        tokenizer_dir="tok",
        extra={"a": 1},
        overwrite=False,
    )


def test_saving_takes_the_layout_that_is_set_up(patched):
    with patch(f"{HERE}.current_topology", return_value=Topology(tp=2)):
        save_pruned_model(object(), "out")
    assert patched.save_checkpoint.call_args.kwargs["topology"] == Topology(tp=2)
    with patch(f"{HERE}.current_topology", return_value=None), pytest.raises(ConfigError, match="pass topology"):
        save_pruned_model(object(), "out")
