"""Checkpoints on the way: where they lie, which ones a command goes on from, and what is never replaced."""

import os
from pathlib import Path

import pytest

from nemo_opt.api import resumable
from nemo_opt.checkpoint.info import CheckpointInfo, write_info
from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology

MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4, vocab_size=300)


def info(path, **changes):
    values = {"path": path, "model": MODEL, "topology": Topology(), "has_optimizer": True, "iteration": 2} | changes
    return CheckpointInfo(**values)


@pytest.fixture
def left(tmp_path):
    """What an interrupted distillation has left beside its output."""

    def write(**changes):
        path = tmp_path / "out-resume"
        path.mkdir(exist_ok=True)
        write_info(info(path, **({"extra": resumable.marks("distill")} | changes)), path)
        return path

    return write


@pytest.mark.parametrize("output", ["out", "out/", Path("a.b/out.c")])
def test_it_lies_beside_the_output(output):
    assert str(resumable.resume_dir(output)) == f"{str(output).rstrip('/')}-resume"


@pytest.mark.parametrize(
    ("command", "changes", "problem"),
    [
        ("train", {}, None),
        ("train", {"extra": resumable.marks("train")}, None),
        ("distill", {"extra": {"own": 1} | resumable.marks("distill")}, None),
        ("distill", {"has_optimizer": False}, "holds no optimizer state: start from its weights"),
        ("distill", {}, "is of a training, a distillation cannot go on from it: start from its weights"),
        ("train", {"extra": resumable.marks("distill")}, "is of a distillation, a training cannot go on from it"),
        ("train", {"iteration": 4}, "is at step 4 of max_steps 4: ask for more steps"),
    ],
)
def test_a_command_goes_on_from_its_own_checkpoints(command, changes, problem):
    checkpoint = info("CKPT", **changes)
    if problem is None:
        resumable.check_resumable(checkpoint, command, max_steps=4)
    else:
        with pytest.raises(ConfigError, match=f"CKPT {problem}"):
            resumable.check_resumable(checkpoint, command, max_steps=4)


def test_an_interrupted_run_is_not_replaced_unless_asked(tmp_path, left):
    check = resumable.check_save_interval
    check(1, tmp_path / "out", "distill")
    path = left()
    with pytest.raises(ConfigError, match="out-resume is what an interrupted distillation left at step 2: resume from it, remove it, or"):
        check(1, tmp_path / "out", "distill")
    check(1, tmp_path / "out", "distill", overwrite=True)
    check(1, tmp_path / "out", "distill", source=tmp_path / "elsewhere" / ".." / path.name)
    check(0, tmp_path / "out", "distill")
    with pytest.raises(ConfigError, match="save_interval -1 < 0"):
        check(-1, tmp_path / "out", "distill")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"has_optimizer": False}, "no optimizer state"),
        ({"extra": {}}, "is of a training"),
        (None, "not a checkpoint: nemo_opt.json is missing"),
    ],
)
def test_what_no_interrupted_run_left_is_never_replaced(tmp_path, left, changes, problem):
    path = left(**(changes or {}))
    if changes is None:
        (path / "nemo_opt.json").rename(path / "notes.txt")
    with pytest.raises(ConfigError, match=f"out-resume, which no interrupted distillation left: .*{problem}"):
        resumable.check_save_interval(1, tmp_path / "out", "distill", overwrite=True)


@pytest.mark.parametrize(("wrote", "from_it", "gone"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_run_clears_what_it_wrote_or_went_on_from(tmp_path, left, wrote, from_it, gone):
    path = left()
    ended = 2**22 + 1  # above the largest process id
    killed = tmp_path / f".{path.name}.partial-{os.uname().nodename}-{ended}-0123abcd"
    killed.mkdir()
    resumable.clear(tmp_path / "out", wrote=wrote, source=path if from_it else tmp_path / "other")
    assert (path.exists(), killed.exists()) == (not gone, not gone)
    resumable.clear(tmp_path / "out", wrote=wrote, source=None)  # nothing there
