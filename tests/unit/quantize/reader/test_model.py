"""Directories that are not what they say: each is refused by name. That good ones compute what they should is proven beside the exports."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.export import export_quantized_hf
from nemo_opt.quantize.reader import open_export
from nemo_opt.testing.quantized import labelled_batches, small_quantized

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    with parallel(Topology()) as topology:
        return {name: export_quantized_hf(small_quantized(name, topology), folder / name) for name in ("fp8", "int4")}


@pytest.fixture
def change(directories, tmp_path):
    """change(algorithm, function) -> a copy of the directory whose tensors went through the function."""

    def make(algorithm, edit):
        copy = shutil.copytree(directories[algorithm], tmp_path / algorithm)
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors")
        return copy

    return make


def _delete(name):
    return lambda tensors: tensors.pop(name)


def _set(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


BAD = [
    ("fp8", _delete(f"{DOWN}.weight_scale"), rf"{DOWN}\.weight_scale is missing"),
    ("fp8", _delete(f"{DOWN}.input_scale"), rf"{DOWN}\.input_scale is missing"),
    ("fp8", _delete("model.layers.0.self_attn.k_proj.k_scale"), r"k_proj\.k_scale is missing"),
    ("fp8", _delete("model.norm.weight"), r"model\.norm\.weight is missing"),
    ("fp8", _set("lm_head.weight_scale", torch.tensor(1.0)), r"lm_head\.weight_scale has no place in the model"),
    ("fp8", _set(f"{DOWN}.pre_quant_scale", torch.ones(128)), r"pre_quant_scale has no place in the model"),
    ("fp8", _set(f"{DOWN}.weight", torch.ones(64, 128)), rf"{DOWN}\.weight is F32, not F8_E4M3"),
    ("fp8", _set(f"{DOWN}.weight_scale", torch.ones(64)), rf"{DOWN}\.weight_scale has shape \(64,\), not \(\) or \(1,\)"),
    ("int4", _set(f"{DOWN}.weight_scale", torch.ones(64, 4)), r"weight_scale has shape \(64, 4\), not \(64, 8\)"),
    ("int4", _delete(f"{DOWN}.weight_shape"), rf"{DOWN}\.weight_shape is missing"),
    ("int4", lambda tensors: [tensors.pop(name) for name in list(tensors) if "packed" in name], "and 8 more"),
]


@pytest.mark.parametrize(("algorithm", "edit", "message"), BAD, ids=[case[2] for case in BAD])
def test_what_does_not_fit_is_named(change, algorithm, edit, message):
    with pytest.raises(CheckpointError, match=message):
        open_export(change(algorithm, edit))


def test_a_truncated_file_is_refused(directories, tmp_path):
    copy = shutil.copytree(directories["fp8"], tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) - 100])
    with pytest.raises(CheckpointError, match=r"is no whole safetensors file \(truncated\?\)"):
        open_export(copy)


def test_a_cache_that_is_named_one_level_up_is_read_too(change, directories):
    """As upstream's exporter for Megatron-Core names it."""

    def rename(tensors):
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            tensors[name.replace("k_proj.", "").replace("v_proj.", "")] = tensors.pop(name)

    (batch,) = labelled_batches(1)
    models = [open_export(path) for path in (directories["fp8"], change("fp8", rename))]
    assert torch.equal(*(model.logits(batch["tokens"]) for model in models))


def test_positions_are_those_that_are_given(directories):
    model = open_export(directories["fp8"])
    (batch,) = labelled_batches(1)
    assert torch.equal(model.logits(batch["tokens"], batch["position_ids"]), model.logits(batch["tokens"]))
    assert not torch.equal(model.logits(batch["tokens"], 2 * batch["position_ids"]), model.logits(batch["tokens"]))


def test_size_is_counted_in_the_files(directories):
    model = open_export(directories["int4"])
    assert model.bits_per_weight == pytest.approx(4 + 32 / 16 + 2 * 64 * 14 / (2 * 36_864))  # codes, scales, shapes
    assert model.formats == {"INT4, weights only": 14, "unquantised": 1}
    total = sum(tensor.nbytes for tensor in load_file(directories["int4"] / "model.safetensors").values())
    assert model.bits_per_parameter == pytest.approx(8 * total / model.parameters, rel=1e-2)
    assert json.loads((directories["int4"] / "config.json").read_text())["vocab_size"] == model.model.config.vocab_size
