import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opt.checkpoint.info import CheckpointInfo, read_info, verify, write_info
from nemo_opt.checkpoint.manifest import hash_files, list_files, write_manifest
from nemo_opt.errors import CheckpointError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology


@pytest.fixture
def info(tmp_path):
    """A header, written and sealed beside one file of weights."""
    info = CheckpointInfo(
        path=tmp_path,
        model=preset("llama3.2-1b"),
        topology=Topology(tp=2, pp=2, vp=2, sp=True),
        world_size=4,
        spec="te",
        iteration=7,
        consumed_samples=56,
        has_optimizer=True,
        scheduler={"max_lr": 1e-4, "num_steps": 7},
        versions={"torch": "2.13.0"},
        extra={"validation_loss": 0.1 + 0.2},
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__0_0.distcp").write_bytes(b"weights")
    write_info(info, tmp_path)
    write_manifest(tmp_path, hash_files(tmp_path, list_files(tmp_path)))
    return info


def edit(path, **changes):
    header = path / "nemo_opt.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))


def test_what_was_written_is_read(info):
    assert read_info(info.path) == info
    assert read_info(str(info.path)) == info
    assert info.weights_dir == info.path / "weights"


def test_the_tokenizer_is_found_if_there_is_one(info):
    assert info.tokenizer_dir is None
    (info.path / "tokenizer").mkdir()
    assert info.tokenizer_dir == info.path / "tokenizer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "announces format 'other', expected 'nemo_opt.checkpoint'"),
        ({"format_version": 2}, "format version 2, this nemo_opt reads up to 1: update"),
        ({"format_version": 0}, "unknown format version 0"),
        ({"format_version": "1"}, "unknown format version '1'"),
        ({"format_version": True}, "unknown format version True"),
        ({"surprise": 1}, r"unknown entries \['surprise'\]"),
        ({"model": {"num_layers": 2}}, "incomplete model settings"),
        ({"model": None}, "model is NoneType"),
        ({"topology": {"tp": 0}}, "tp must be a positive integer"),
        ({"topology": {"xp": 1}}, "xp"),
        ({"topology": []}, "topology is list"),
        ({"iteration": "3"}, "iteration is '3', a str"),
        ({"has_optimizer": None}, "has_optimizer is None"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(info, changes, message):
    edit(info.path, **changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_info(info.path)
    assert "nemo_opt.json" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_header_is_refused(info, text):
    (info.path / "nemo_opt.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"nemo_opt\.json"):
        read_info(info.path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ([], "is missing"),
        (["config.json"], "Hugging Face directory.*nemo-opt import"),
        ([".metadata"], "bare Megatron-Core checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path, files, message):
    path = tmp_path / "c"
    if files is not None:
        path.mkdir()
        for name in files:
            (path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        read_info(path)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "c").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        read_info(tmp_path / "c")


def test_verify_compares_contents_only_if_deep(info):
    (info.path / "weights" / "__0_0.distcp").write_bytes(b"WEIGHTS")
    assert verify(info.path, deep=False) == info
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is altered"):
        verify(info.path)


def test_reading_loads_no_torch(info):
    code = f"import sys; from nemo_opt.checkpoint import read_info, verify; verify({str(info.path)!r}); print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60, check=True)
    assert done.stdout.strip() == "False"
