import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError
from nemo_opt.models.safetensors_dir import SafetensorsReader, SafetensorsWriter

WEIGHTS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5), "c": torch.zeros(2, 2)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


def _write(directory, weights=WEIGHTS, max_file_bytes=10**6):
    writer = SafetensorsWriter(directory, max_file_bytes=max_file_bytes)
    for name, tensor in weights.items():
        writer.add(name, tensor)
    writer.close()
    return directory


def test_one_file_and_a_slice_of_it(tmp_path):
    reader = SafetensorsReader(_write(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    reader.check(SHAPES)
    assert reader.read("a", (slice(1, 3), slice(0, 2))).tolist() == [[4.0, 5.0], [8.0, 9.0]]


def test_several_files_and_their_index(tmp_path):
    _write(tmp_path, max_file_bytes=50)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 12 * 4 + 5 * 4 + 4 * 4
    assert index["weight_map"] == {"a": files[0], "b": files[1], "c": files[1]}
    assert all(torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor) for name, tensor in WEIGHTS.items())
    SafetensorsReader(tmp_path).check(SHAPES)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**SHAPES, "d": (1,), "e": (1,)}, "lacks d, e"),
        ({"a": (3, 4), "b": (5,)}, "does not have: c"),
        ({**SHAPES, "a": (4, 3)}, r"a has shape \(3, 4\), the model needs \(4, 3\)"),
        ({**SHAPES, **{f"x{i}": (1,) for i in range(10)}}, "lacks x0, .*x7 and 2 more"),
    ],
)
def test_differences_are_named(tmp_path, expected, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(_write(tmp_path)).check(expected)


def test_optional_weights_may_be_there(tmp_path):
    SafetensorsReader(_write(tmp_path)).check({"a": (3, 4), "b": (5,)}, optional=frozenset({"c"}))


def test_quantized_weights_are_refused(tmp_path):
    _write(tmp_path, WEIGHTS | {"b": torch.ones(5, dtype=torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="b is F8_E4M3, a quantised weight"):
        SafetensorsReader(tmp_path).check(SHAPES)


def test_truncated_file_is_refused(tmp_path):
    file = _write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model.safetensors is no whole safetensors file \(truncated\?\)"):
        SafetensorsReader(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        SafetensorsReader(tmp_path)
    _write(tmp_path, max_file_bytes=50)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing, but .*index.json names it"):
        SafetensorsReader(tmp_path)


def test_file_that_breaks_the_promise_of_the_index_is_named(tmp_path):
    _write(tmp_path, max_file_bytes=50)
    save_file({"b": WEIGHTS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors lacks c"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no index.*JSONDecodeError"),
        ("{}", "no index.*KeyError"),
        ('{"weight_map": {}}', "no index"),
        ('{"weight_map": {"a": 3}}', "must map names to files"),
        ('{"weight_map": ["a"]}', "no index"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', r"outside its directory: \['../../secret.safetensors'\]"),
    ],
)
def test_damaged_index_is_refused(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path)
