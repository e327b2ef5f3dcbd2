"""Directories that are not what they say: each is refused by name. That good ones compute what they should is proven beside the exports."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.export import export_quantized_hf
from nemo_opt.quantize.reader import model as reader_model
from nemo_opt.quantize.reader import open_export
from nemo_opt.quantize.reader.description import LinearForm
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
    assert model.parameters == sum(parameter.numel() for parameter in model.model.parameters())
    total = sum(tensor.nbytes for tensor in load_file(directories["int4"] / "model.safetensors").values())
    assert model.bits_per_parameter == pytest.approx(8 * total / model.parameters, rel=1e-2)
    assert json.loads((directories["int4"] / "config.json").read_text())["vocab_size"] == model.model.config.vocab_size


class _Files:
    """Tensors as a directory holds them."""

    def __init__(self, tensors):
        self.tensors, self.names = tensors, set(tensors)

    def whole(self, name):
        return self.tensors[name]


@pytest.mark.parametrize(
    ("inputs", "stored", "expected"),
    [
        (None, {}, [0.3, 2.6]),
        (None, {"pre_quant_scale": [2.0, 0.5]}, [0.6, 1.3]),
        ("int8", {"input_scale": 1.0}, [0, 3]),
        ("int8", {"input_scale": [0.5], "pre_quant_scale": [2.0, 0.5]}, [0.5, 1.5]),
        ("int8_token", {}, [15 * 2.6 / 127, 2.6]),
    ],
)
def test_inputs_are_scaled_and_then_rounded(inputs, stored, expected):
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.eye(2)
    files = _Files({f"down.{name}": torch.tensor(value, dtype=torch.bfloat16) for name, value in stored.items()})
    reader_model._hook(linear, LinearForm(weight="int8", group=(1, 0), inputs=inputs, label=""), files, "down", "cpu")
    assert linear(torch.tensor([0.3, 2.6])).tolist() == pytest.approx(expected)
    assert bool(linear._forward_pre_hooks) == bool(inputs or stored)


def test_a_scale_that_only_some_layers_have_is_named():
    linears = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "down_proj")]
    description = SimpleNamespace(linears=dict.fromkeys(linears))
    scales = {f"model.layers.{layer}.mlp.down_proj.pre_quant_scale": None for layer in (0, 2)}
    assert reader_model._partial(_Files(scales), description) == [
        "model.layers.1.mlp.down_proj.pre_quant_scale is missing, other layers have it"
    ]
    assert reader_model._partial(_Files(scales | {"model.layers.1.mlp.down_proj.pre_quant_scale": None}), description) == []
    assert reader_model._partial(_Files({}), description) == []


@pytest.mark.parametrize(
    ("name", "config", "tied"),
    [
        ("lm_head.weight", {"tie_word_embeddings": True}, True),
        ("lm_head.weight", {"tie_word_embeddings": False}, False),
        ("lm_head.weight", {}, False),
        ("model.norm.weight", {"tie_word_embeddings": True}, False),
    ],
)
def test_only_a_tied_head_is_no_tensor(name, config, tied):
    assert reader_model._is_tied(name, SimpleNamespace(config=config)) is tied


def test_a_tied_head_is_the_embedding_whether_it_is_stored_or_not(change, tmp_path):
    def tie(tensors, keep):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not keep:
            del tensors["lm_head.weight"]

    (batch,) = labelled_batches(1)
    logits = []
    for keep in (True, False):
        directory = change("fp8", lambda tensors, keep=keep: tie(tensors, keep))
        if not keep:
            config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
            (directory / "config.json").write_text(json.dumps(config))
        model = open_export(directory)
        logits.append(model.logits(batch["tokens"]))
        head = model.model.lm_head.weight
        assert (head.data_ptr() == model.model.model.embed_tokens.weight.data_ptr()) is not keep
        shutil.rmtree(directory)
    assert torch.equal(*logits)


def test_types_have_their_sizes():
    types = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
    assert {name: size * 8 for name, size in types.items()} == reader_model._BITS
    assert set(reader_model._FLOATS) == {"F64", "F32", "BF16", "F16"}


def test_problems_are_told_in_order_of_names(change):
    def spoil(tensors):
        for name in (f"{DOWN}.weight_scale", f"{DOWN}.input_scale"):
            del tensors[name]
        tensors |= {"z.extra": torch.ones(1), "a.extra": torch.ones(1)}
        return tensors

    with pytest.raises(CheckpointError) as refusal:
        open_export(change("fp8", spoil))
    missing = [f"{DOWN}.{name} is missing" for name in ("input_scale", "weight_scale")]
    said = "; ".join([*missing, *(f"{name}.extra has no place in the model" for name in "az")])
    assert str(refusal.value).endswith(f"is not what its description says: {said}")
