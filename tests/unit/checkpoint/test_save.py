import errno
import functools
import os
import shutil
import signal
import subprocess
import time

import nemo_opt._stack

import pytest
import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_opt.checkpoint import writer
from nemo_opt.checkpoint.info import read_info, verify
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.errors import CheckpointError, ConfigError, UpstreamMovedError
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology, parallel

TINY = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2, vocab_size=128)


@pytest.fixture(scope="module")
def layout():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture(scope="module")
def chunks(layout):
    return build_model(TINY, layout, spec="local", seed=1)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_directory_describes_itself(chunks, layout, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "vocabulary").write_text("{}")
    (tmp_path / "words" / "tokenizer.json").symlink_to(tmp_path / "vocabulary")  # as in Hugging Face's cache
    saved = save_checkpoint(
        tmp_path / "new" / "c", chunks, topology=layout, tokenizer_dir=tmp_path / "words", iteration=2, extra={"loss": 0.1, "tags": ["a"]}
    )
    assert names(saved.path) == ["manifest.json", "nemo_opt.json", "tokenizer", "weights"]
    assert names(saved.path.parent) == ["c"]
    assert verify(saved.path) == read_info(saved.path) == saved
    assert (saved.model, saved.spec, saved.topology, saved.iteration) == (TINY, "local", Topology(dp=1), 2)
    assert saved.extra == {"loss": 0.1, "tags": ["a"]}
    assert saved.tokenizer_dir is not None
    assert names(saved.tokenizer_dir) == ["tokenizer.json"]
    assert {"nemo_opt", "torch", "megatron-core", "nvidia-modelopt", "python"} == saved.versions.keys()


def test_saving_starts_no_process_and_is_quick(chunks, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.multiprocessing.get_context", None)  # what Megatron-Core's manager comes from
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "fork", None)
    save_checkpoint(tmp_path / "warm_up", chunks, topology=layout)
    times_s = []
    for number in range(3):
        start_s = time.perf_counter()
        save_checkpoint(tmp_path / str(number), chunks, topology=layout)
        times_s.append(time.perf_counter() - start_s)
    # 0.05 s alone on two cores; a manager process takes 1 s, and importing the main module again 15 s
    assert min(times_s) < 0.5


def test_an_existing_target_is_refused_and_replaced_on_request(chunks, layout, tmp_path):
    save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=1)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=2)
    assert verify(tmp_path / "c").iteration == 1
    save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=2, overwrite=True)
    assert verify(tmp_path / "c").iteration == 2
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"extra": {"a": object()}}, "extra must hold JSON values only"),
        ({"extra": {"a": float("nan")}}, "extra must hold JSON values only"),
        ({"extra": {"a": (1, 2)}}, "come back as they were"),
        ({"extra": {1: 2}}, "come back as they were"),
        ({"tokenizer_dir": "/nowhere"}, "tokenizer_dir /nowhere is not a directory"),
        ({"model_config": TINY.with_(hidden_size=32)}, "hidden_size 32 in model_config, 16 in the model"),
        ({"topology": Topology(tp=2)}, "world_size 1"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(chunks, layout, tmp_path, request_, message):
    with pytest.raises(ConfigError, match=message):
        save_checkpoint(tmp_path / "c", chunks, **({"topology": layout} | request_))
    assert names(tmp_path) == []


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (filesystem_async, "_write_item"),
        (serialization, "save_config"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        ("nemo_opt.checkpoint.save", "write_info"),
        ("nemo_opt.checkpoint.atomic", "_flush"),
    ],
    ids=["weights", "metadata.json", ".metadata", "nemo_opt.json", "flush"],
)
def test_a_full_disk_leaves_nothing_new_behind(chunks, layout, tmp_path, monkeypatch, owner, name):
    save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=1)
    monkeypatch.setattr(*(f"{owner}.{name}",) if isinstance(owner, str) else (owner, name), full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=2, overwrite=True)
    assert names(tmp_path) == ["c"]
    assert verify(tmp_path / "c").iteration == 1


def test_a_disk_that_is_too_small_is_refused_at_once(chunks, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"0\.00 GB free, 0\.00 GB are needed"):
        save_checkpoint(tmp_path / "c", chunks, topology=layout)
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(chunks, layout, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write next to"):
        save_checkpoint(tmp_path / "file" / "c", chunks, topology=layout)


def test_patches_fail_by_name_when_upstream_has_moved(monkeypatch, tmp_path, chunks, layout):
    monkeypatch.setattr(writer, "_TARGETS", [(filesystem_async, "gone")])
    with pytest.raises(UpstreamMovedError, match=r"filesystem_async\.gone is gone"):
        save_checkpoint(tmp_path / "c", chunks, topology=layout)
    assert names(tmp_path) == []


def save_and_die(path, config):
    """Overwrites a checkpoint and is killed after half of its tensors."""
    with parallel(Topology()) as topology:
        chunks = build_model(config, topology, spec="local", seed=2)
        write, left = filesystem_async._write_item, [4]

        @functools.wraps(write)  # Megatron-Core looks at its signature
        def write_and_die(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **kwargs)

        filesystem_async._write_item = write_and_die
        save_checkpoint(path, chunks, topology=topology, overwrite=True)


@pytest.mark.ranks
def test_a_killed_save_leaves_the_old_one_whole(ranks, chunks, layout, tmp_path):
    from nemo_opt.testing.ranks import RankError

    save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=1)
    with pytest.raises(RankError, match="exit code -9"):
        ranks(1).run(save_and_die, tmp_path / "c", TINY)
    assert len(names(tmp_path)) == 2, "the killed save was beside the old one"
    restored, info = restore_model(tmp_path / "c", layout, spec="local")
    assert info.iteration == 1
    assert torch.equal(restored[0].output_layer.weight, chunks[0].output_layer.weight)
    save_checkpoint(tmp_path / "c", chunks, topology=layout, iteration=2, overwrite=True)
    assert names(tmp_path) == ["c"], "the next save removes what the killed one left"


def save_with_one_full_disk(path, config, failing_rank):
    with parallel(Topology(tp=2)) as topology:
        chunks = build_model(config, topology, spec="local", seed=2)
        write = filesystem_async._write_item
        if torch.distributed.get_rank() == failing_rank:
            filesystem_async._write_item = full_disk
        try:
            save_checkpoint(path, chunks, topology=topology)
        except CheckpointError as error:
            return str(error)
        finally:
            filesystem_async._write_item = write
    return "saved"


@pytest.mark.ranks
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_every_rank_hears_of_a_full_disk(ranks, tmp_path, failing_rank):
    messages = ranks(2).run(save_with_one_full_disk, tmp_path / "c", TINY, failing_rank)
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    assert names(tmp_path) == []


def test_a_checkpoint_that_is_not_proven_leaves_the_older_one(chunks, layout, tmp_path):
    seen = []
    saved = save_checkpoint(
        tmp_path / "c", chunks, topology=layout, extra={"number": 1}, prove=lambda path: seen.append(verify(path).extra)
    )
    assert seen == [{"number": 1}], "whole when it is shown"

    def refuse(path):
        assert path != saved.path
        raise CheckpointError("computes something else")

    with pytest.raises(CheckpointError, match="something else"):
        save_checkpoint(tmp_path / "c", chunks, topology=layout, extra={"number": 2}, prove=refuse, overwrite=True)
    assert verify(saved.path).extra == {"number": 1}
    assert names(tmp_path) == ["c"]
