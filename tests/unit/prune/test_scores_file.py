import json
import os
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import preset
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.scores_file import read_scores_file, write_scores_file

MODEL = preset("tiny", num_layers=2, num_moe_experts=4)


def _scores(**changes):
    fields = {
        "hidden": torch.rand(128, dtype=torch.float64),
        "ffn": {1: torch.rand(4, 256), 2: torch.rand(4, 256)},
        "heads": {1: torch.rand(8), 2: torch.rand(8)},
        "groups": {1: torch.rand(4), 2: torch.rand(4)},
        "experts": {1: torch.rand(4), 2: torch.rand(4)},
        "layers": torch.rand(2),
        "model": MODEL,
        "tokens": 7,
        "digest": "abc",
    }
    return ImportanceScores(**(fields | changes))


def test_what_is_saved_is_loaded(tmp_path):
    path, scores = tmp_path / "new" / "folder" / "scores.safetensors", _scores()
    for _ in range(2):  # the second replaces the first
        scores.save(path)
    loaded = ImportanceScores.load(path, model=MODEL)
    assert list(path.parent.iterdir()) == [path]
    assert (loaded.model, loaded.tokens, loaded.digest) == (MODEL, 7, "abc")
    assert torch.equal(loaded.hidden, scores.hidden)
    assert torch.equal(loaded.layers, scores.layers)
    for name in ("ffn", "heads", "groups", "experts"):
        ours, theirs = getattr(scores, name), getattr(loaded, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[number], theirs[number]) for number in ours)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, r"\{'num_layers': 2\}, this one has \{'num_layers': 3\}"),
        ({"hidden_size": 64, "kv_channels": 16}, r"\{'hidden_size': 128\}.*\{'hidden_size': 64\}"),
        ({"ffn_hidden_size": 64}, "256.*64"),
        ({"num_moe_experts": None}, r"\{'num_moe_experts': 4\}.*None"),
        ({"num_query_groups": 2}, r"\{'num_query_groups': 4\}.*2"),
        ({"kv_channels": 8}, r"\{'head_dim': 16\}.*8"),
    ],
)
def test_scores_of_another_model_are_refused_with_both_sides(tmp_path, change, named):
    _scores().save(tmp_path / "scores")
    with pytest.raises(ConfigError, match=named) as caught:
        ImportanceScores.load(tmp_path / "scores", model=MODEL.with_(**change))
    assert str(tmp_path / "scores") in str(caught.value)


def test_a_vocabulary_or_context_length_makes_no_other_model():
    _scores().check_model(MODEL.with_(vocab_size=999, max_position_embeddings=8))


def test_directories_are_not_overwritten(tmp_path):
    with pytest.raises(CheckpointError, match="is a directory"):
        _scores().save(tmp_path)


def test_nothing_is_left_of_a_save_that_fails(tmp_path):
    with pytest.raises(TypeError):
        write_scores_file(tmp_path / "scores", {"hidden": torch.ones(1)}, {"model": object()})
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_beside_its_place_under_a_hidden_name(tmp_path):
    with patch("nemo_opt.prune.scores_file.save_file", side_effect=OSError("disk full")) as save, pytest.raises(OSError, match="full"):
        write_scores_file(tmp_path / "scores", {}, {})
    assert save.call_args.args[1] == tmp_path / f".scores.partial-{os.getpid()}"


def _header(**changes):
    return {"format": "nemo_opt.importance_scores", "version": 1, "model": {}, "tokens": 1, "digest": ""} | changes


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (json.dumps(_header(version=2)), "version 2"),
        (json.dumps(_header(format="other")), "'other'"),
        (json.dumps(_header(tokens="1")), r"\['tokens'\]"),
        (json.dumps(_header(model=None, digest=None)), r"\['model', 'digest'\]"),
        ("{", "damaged"),
        (None, "format is None"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, header, named):
    path = tmp_path / "scores"
    save_file({"hidden": torch.ones(1)}, path, metadata=None if header is None else {"nemo_opt": header})
    with pytest.raises(CheckpointError, match=named):
        read_scores_file(path)


def test_truncated_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "scores"
    with pytest.raises(CheckpointError, match="no such file"):
        ImportanceScores.load(path)
    _scores().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        ImportanceScores.load(path)
