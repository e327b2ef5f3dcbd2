"""Proofs: what is right passes at several layouts, and each planted fault is found, removed and reported on every rank."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.export import export_quantized_hf
from nemo_opt.quantize.proof import prove_checkpoint, prove_export
from nemo_opt.testing.quantized import labelled_batches, small_quantized

LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture(scope="module")
def one():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture(scope="module")
def model(one):
    """algorithm -> chunks, made when first asked for; proofs leave them as they were."""
    made = {}

    def get(algorithm, **settings):
        key = algorithm, tuple(sorted(settings.items()))
        if key not in made:
            made[key] = small_quantized(algorithm, one, **settings)
        return made[key]

    return get


def _prove(chunks, folder, change=None, dtype=None):
    """Exports, lets `change` at the tensors of the file, and proves; the report."""
    reports = []

    def prove(directory, plan):
        if change is not None and Path(directory).exists():
            file = Path(directory) / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)
        reports.append(prove_export(directory, chunks, plan, labelled_batches(2)))

    export_quantized_hf(chunks, f"{folder}/out", dtype=dtype, prove=prove)
    return reports[0]


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.wide)])
@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", "mxfp8"])
def test_an_export_is_proven_and_the_model_is_untouched(model, tmp_path, algorithm, dtype):
    chunks = model(algorithm)
    before = {name: tensor.clone() for name, tensor in chunks[0].state_dict().items() if isinstance(tensor, torch.Tensor)}
    report = _prove(chunks, tmp_path, dtype=dtype)
    assert report.tokens == 64
    assert report.weight_error <= 2**-22
    assert report.scale_error <= 2**-22
    assert report.logit_error <= report.logit_bound
    assert abs(report.loss_difference) <= report.loss_bound
    assert report.logit_bound <= 2e-2
    assert all(torch.equal(chunks[0].state_dict()[name], tensor) for name, tensor in before.items())
    assert (tmp_path / "out" / "config.json").exists()


def _swap(suffix):
    def change(tensors):
        first, second = (f"{layer}.{suffix}" for layer in LAYERS)
        assert not torch.equal(tensors[first].float(), tensors[second].float())
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def _scale(name, factor):
    def change(tensors):
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def _drop(suffix):
    def change(tensors):
        names = [name for name in tensors if name.endswith(suffix)]
        assert names
        for name in names:
            del tensors[name]

    return change


def _shift_row(name):
    def change(tensors):
        tensors[name][5] = tensors[name][6]

    return change


DOWN = f"{LAYERS[1]}.mlp.down_proj"
FAULTS = {
    "scales of two layers swapped": ("int8", _swap("mlp.down_proj.weight_scale"), "an error of weights"),
    "one scale doubled": ("fp8", _scale(f"{DOWN}.weight_scale", 2.0), "an error of weights"),
    "one scale a thousandth off": ("nvfp4", _scale(f"{DOWN}.weight_scale_2", 1.001), "an error of weights"),
    "one row has its neighbour's scale": ("int4", _shift_row(f"{DOWN}.weight_scale"), "an error of weights"),
    "input scales of two layers swapped": ("int8", _swap("mlp.down_proj.input_scale"), "an error of scales"),
    "an input scale doubled": ("nvfp4", _scale(f"{DOWN}.input_scale", 2.0), "an error of scales"),
    "scales before the inputs dropped": ("int4_awq", _drop("pre_quant_scale"), "an error of logits"),
    "some scales before the inputs dropped": ("w4a8_awq", _drop("layers.0.self_attn.o_proj.pre_quant_scale"), "pre_quant_scale is missing"),
    "a norm without what was folded in": ("int8_sq", _scale(f"{LAYERS[0]}.input_layernorm.weight", 1.0001), "an error of weights"),
    "a scale dropped": ("fp8", _drop(f"{DOWN}.input_scale"), "down_proj.input_scale is missing"),
    "a cache without its range": ("fp8", _scale(f"{LAYERS[0]}.self_attn.k_proj.k_scale", 0.5), "an error of scales"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_the_output_removed(model, tmp_path, fault):
    algorithm, change, message = FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        _prove(model(algorithm), tmp_path, change)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_was_left_unquantised_is_found(model, tmp_path):
    def change(tensors):
        scale = tensors.pop(f"{DOWN}.weight_scale")
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].float() * scale

    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight_scale is missing; {DOWN}.weight is F32, not F8_E4M3"):
        _prove(model("fp8"), tmp_path, change)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_quantised_but_was_not_is_found(one, tmp_path):
    """The description and the files agree with each other, and disagree with the model."""
    chunks = small_quantized("fp8", one, enable_kv_cache=False)
    linear = chunks[0].decoder.layers[1].mlp.linear_fc2

    def prove(directory, plan):
        for quantizer in (linear.weight_quantizer, linear.input_quantizer):
            quantizer.disable()
        prove_export(directory, chunks, plan, labelled_batches(2))

    with pytest.raises(CheckpointError, match="is not the model in memory: an error of weights of"):
        export_quantized_hf(chunks, tmp_path / "out", prove=prove)
    assert not list(tmp_path.iterdir())


def _prove_at(name, folder, algorithms, change=None):
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    results = {}
    for algorithm in algorithms:
        chunks = small_quantized(algorithm, topology)
        reports = []

        def prove(directory, plan, chunks=chunks, reports=reports):
            if plan is not None and change is not None:  # rank 0
                description = json.loads((Path(directory) / "config.json").read_text())
                change(description)
                (Path(directory) / "config.json").write_text(json.dumps(description))
            reports.append(prove_export(directory, chunks, plan, labelled_batches(2)))

        try:
            export_quantized_hf(chunks, f"{folder}/{algorithm}", prove=prove)
            results[algorithm] = reports[0]
        except CheckpointError as error:
            results[algorithm] = str(error)
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["PP2", *(pytest.param(name, marks=pytest.mark.wide) for name in ("TP2", "TP2PP2", "DP2", "CP2"))])
def test_exports_are_proven_at_every_layout(ranks, tmp_path, layout):
    first, *others = ranks(Topology.from_name(layout).world_size).run(_prove_at, layout, str(tmp_path), ["int8_sq", "int4_awq"])
    assert all(other == first for other in others)
    for report in first.values():
        assert report.weight_error <= 2**-22
        assert report.logit_error <= report.logit_bound


def _halve_the_norms_epsilon(description):
    description["rms_norm_eps"] = 0.1


@pytest.mark.ranks
def test_every_rank_hears_of_a_failed_proof(ranks, tmp_path):
    first, second = ranks(2).run(_prove_at, "PP2", str(tmp_path), ["int4"], _halve_the_norms_epsilon)
    assert first == second
    assert "an error of logits of" in first["int4"]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------- checkpoints


def _save(chunks, path, topology):
    from nemo_opt.checkpoint.save import save_checkpoint

    save_checkpoint(path, chunks, topology=topology)
    return path


@pytest.mark.parametrize("algorithm", ["fp8", "int4_awq", "nvfp4"])
def test_a_checkpoint_is_proven_exactly(model, one, tmp_path, algorithm):
    report = prove_checkpoint(_save(model(algorithm), tmp_path / "out", one), model(algorithm), one, labelled_batches(1))
    assert (report.logit_error, report.loss_difference, report.logit_bound) == (0.0, 0.0, 0.0)


def test_a_checkpoint_of_another_model_is_removed(model, one, tmp_path):
    path = _save(model("fp8"), tmp_path / "out", one)
    other = small_quantized("fp8", one, seed=6)
    with pytest.raises(CheckpointError, match="differs from the model in memory"):
        prove_checkpoint(path, other, one, labelled_batches(1))
    assert not path.exists()


def test_an_amax_in_another_place_is_found(one, tmp_path):
    chunks = small_quantized("int8", one)
    path = _save(chunks, tmp_path / "out", one)
    amax = chunks[0].decoder.layers[0].mlp.linear_fc1.weight_quantizer._amax
    amax.copy_(amax.roll(1, dims=0))
    with pytest.raises(CheckpointError, match=r"weight_quantizer\._amax_\w differs"):
        prove_checkpoint(path, chunks, one, labelled_batches(1))
    assert not path.exists()
