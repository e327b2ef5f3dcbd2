import contextlib
import copy as copying
import io
import os
import pickle
import pickletools
import shutil
import threading
from pathlib import Path

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nemo_opt.checkpoint import manifest, safe_unpickle
from nemo_opt.checkpoint.load import load_checkpoint, restore_model
from nemo_opt.checkpoint.safe_unpickle import guarded, inspect_weights, pickle_globals, read_metadata
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.errors import CheckpointError
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology, parallel

TINY = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=1, vocab_size=128)
REFUSAL = r"refusing to unpickle (posix|nt)\.mkdir"


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def payload(tmp_path):
    """A payload whose marker must not exist when the test ends."""
    payload = Payload(tmp_path / "the payload ran")
    yield payload
    assert not Path(payload.marker).exists(), "the payload was executed"


@pytest.fixture(scope="module")
def layout():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture(scope="module")
def saved(layout, tmp_path_factory):
    """A checkpoint of a model quantised to FP8."""
    chunks = build_model(TINY, layout, spec="local")
    token_BS = torch.arange(8).view(1, 8)
    mask = torch.triu(torch.ones(1, 1, 8, 8, dtype=torch.bool), 1)
    mtq.quantize(chunks[0], copying.deepcopy(mtq.FP8_DEFAULT_CFG), lambda model: model(token_BS, token_BS, mask))
    path = tmp_path_factory.mktemp("saved") / "c"
    save_checkpoint(path, chunks, topology=layout)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def archive(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def plant_entry(weights, wanted, content):
    """Gives the first entry whose name holds `wanted` the contents of a new file."""
    metadata = read_metadata(weights)
    index = next(index for index in metadata.storage_data if wanted in index.fqn)
    (weights / "__9_0.distcp").write_bytes(content)
    location = metadata.storage_data[index]
    location.relative_path, location.offset, location.length = "__9_0.distcp", 0, len(content)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_metadata(weights, payload):
    metadata = read_metadata(weights)
    metadata.planner_data = payload
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


PLACES = {
    ".metadata": lambda path, payload: plant_metadata(path / "weights", payload),
    "common state": lambda path, payload: plant_entry(path / "weights", "common_state", archive([payload])),
    "common.pt": lambda path, payload: (path / "weights/common.pt").write_bytes(archive(payload)),
    "_extra_state": lambda path, payload: plant_entry(path / "weights", "_extra_state", archive([payload])),
    "archive in _extra_state": lambda path, payload: plant_entry(
        path / "weights", "_extra_state", archive([as_tensor(archive({"extra_state": payload}))])
    ),
    "pickle in _extra_state": lambda path, payload: plant_entry(
        path / "weights", "_extra_state", archive([as_tensor(pickle.dumps(payload))])
    ),
    "buffer in _extra_state": lambda path, payload: plant_entry(path / "weights", "_extra_state", archive([io.BytesIO(archive(payload))])),
    "modelopt_state/.metadata": lambda path, payload: plant_metadata(path / "weights/modelopt_state", payload),
    "modelopt_state": lambda path, payload: plant_entry(path / "weights/modelopt_state", "common_state", archive([payload])),
    "modelopt_state/common.pt": lambda path, payload: (path / "weights/modelopt_state/common.pt").write_bytes(archive(payload)),
    "tensor": lambda path, payload: plant_entry(path / "weights", "output_layer.weight", archive(payload)),
}


def plant(path, place, payload):
    PLACES[place](path, payload)
    manifest.write_manifest(path, manifest.hash_files(path, manifest.list_files(path)))


def test_an_honest_checkpoint_passes(copy, layout):
    restore_model(copy, layout, spec="local")


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_refused_by_name_and_never_runs(copy, layout, payload, place):
    plant(copy, place, payload)
    with pytest.raises(CheckpointError, match=REFUSAL):
        restore_model(copy, layout, spec="local")


@pytest.mark.parametrize("place", [place for place in PLACES if place != "tensor"])
def test_it_is_refused_before_a_model_is_built_and_with_the_file(copy, layout, payload, monkeypatch, place):
    monkeypatch.setattr("nemo_opt.checkpoint.load.build_model", None)
    plant(copy, place, payload)
    with pytest.raises(CheckpointError, match=REFUSAL) as refused:
        restore_model(copy, layout, spec="local")
    assert str(copy / "weights") in str(refused.value)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in (".metadata", "buffer in _extra_state")])
def test_the_guard_alone_stops_it_even_where_the_environment_asks_to_trust(copy, layout, payload, monkeypatch, place):
    """Without the early inspection, and with the variable by which torch and ModelOpt turn weights_only off."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("nemo_opt.checkpoint.load.inspect_weights", read_metadata)
    plant(copy, place, payload)
    with pytest.raises(CheckpointError, match=REFUSAL):
        restore_model(copy, layout, spec="local")


def upstream_reads_metadata(weights):
    FileSystemReader(weights).read_metadata()


def upstream_reads_common_state(weights):
    dist_checkpointing.load_common_state_dict(weights)


@pytest.mark.parametrize(("place", "read"), [(".metadata", upstream_reads_metadata), ("common state", upstream_reads_common_state)])
def test_upstream_runs_a_payload_unless_it_is_guarded(copy, layout, tmp_path, place, read):
    """Shows that the payload is live; when it fails, upstream has mended the fault."""
    marker = tmp_path / "the payload ran"
    plant(copy, place, Payload(marker))
    with pytest.raises(CheckpointError, match=REFUSAL), guarded():
        read(copy / "weights")
    assert not marker.exists()
    with contextlib.suppress(AttributeError, TypeError):  # it is not what upstream expected to find
        read(copy / "weights")
    assert marker.exists()


def test_a_legacy_common_state_is_refused_though_harmless(copy, layout):
    plant(copy, "common.pt", {"iteration": 3})
    with pytest.raises(CheckpointError, match=r"common\.pt: this format has no such file"):
        load_checkpoint(copy, build_model(TINY, layout, spec="local"))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(["not", "a table"])])
def test_a_damaged_table_of_contents_is_named(copy, content):
    (copy / "weights/.metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        read_metadata(copy / "weights")


@pytest.mark.parametrize("name", ["../nemo_opt.json", "/etc/hostname", "..", "missing.distcp"])
def test_a_table_of_contents_that_points_elsewhere_is_refused(copy, name):
    metadata = read_metadata(copy / "weights")
    next(iter(metadata.storage_data.values())).relative_path = name
    (copy / "weights/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is no file of"):
        read_metadata(copy / "weights")


def test_a_damaged_entry_is_named(copy):
    plant_entry(copy / "weights", "common_state", b"PK\x03\x04 but no archive")
    with pytest.raises(CheckpointError, match=r"__9_0\.distcp, entry common_state.* is damaged"):
        inspect_weights(copy / "weights")


# --- the guard ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "read",
    [
        lambda data: pickle.loads(data),
        lambda data: pickle.load(io.BytesIO(data)),
        lambda data: pickle.Unpickler(io.BytesIO(data)).load(),
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    ],
    ids=["loads", "load", "Unpickler", "torch.load"],
)
def test_every_way_to_unpickle_is_guarded(payload, protocol, read):
    data = pickle.dumps(payload, protocol)
    with pytest.raises(CheckpointError, match=REFUSAL), guarded():
        read(data)


def test_a_swallowed_refusal_is_raised_when_the_guard_closes(payload):
    with pytest.raises(CheckpointError, match=REFUSAL), guarded(), contextlib.suppress(RuntimeError):
        pickle.loads(pickle.dumps(payload))


def test_what_is_replaced_comes_back(payload):
    before = pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.serialization.load
    with guarded():
        assert pickle.load is not before[0]
    assert (pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.serialization.load) == before


def test_other_threads_and_harmless_pickles_go_on(tmp_path):
    marker, results = tmp_path / "another thread", []

    def elsewhere():
        results.append(pickle.loads(pickle.dumps(Payload(marker))))
        results.append(torch.load(io.BytesIO(archive(Path("x"))), weights_only=False))

    with guarded():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(timeout=60)
        assert pickle.loads(pickle.dumps({"a": [1, 2.5, torch.Size([3]), torch.float32]})) == {
            "a": [1, 2.5, torch.Size([3]), torch.float32]
        }
        assert torch.equal(torch.load(io.BytesIO(archive(torch.arange(3)))), torch.arange(3))
    assert marker.exists()
    assert results[1] == Path("x")


def test_a_tensor_in_a_plain_pickle_is_rebuilt_with_weights_only():
    with guarded():
        assert torch.equal(pickle.loads(pickle.dumps(torch.arange(3))), torch.arange(3))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_globals_are_listed_without_running_anything(payload, protocol):
    data = pickle.dumps([payload, Path("x"), payload], protocol)
    assert f"{os.mkdir.__module__}.mkdir" in pickle_globals(data)
    assert any(name.endswith("PosixPath") for name in pickle_globals(pickletools.optimize(data)))


def test_globals_of_an_archive_and_of_a_computed_name_are_listed(payload):
    assert pickle_globals(archive(payload)) == [f"{os.mkdir.__module__}.mkdir"]
    assert pickle_globals(pickle.PROTO + b"\x04" + pickle.STACK_GLOBAL + pickle.STOP) == ["a global with a computed name"]
    assert pickle_globals(b"(ios\nsystem\n.") == ["os.system"]


def test_a_file_on_disk_is_scanned_too(tmp_path, payload):
    path = tmp_path / "f.pt"
    path.write_bytes(pickle.dumps(payload, 4))
    with pytest.raises(CheckpointError, match=REFUSAL), guarded():
        torch.load(path)


def test_an_opcode_that_is_not_allowed_is_named():
    assert "something that is not allowed (odd opcode)" in str(safe_unpickle._refusal([], "odd opcode"))
