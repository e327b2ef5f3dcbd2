"""ModelOpt's TensorRT-LLM writer is believed in nothing: layouts are checked before, files after, and a failure leaves nothing behind."""

import json
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.quantize.export.artifacts import save_artifacts
from nemo_opt.quantize.export.trtllm import export_trtllm

HERE = "nemo_opt.quantize.export.trtllm"
ENGINE = {"decoder_type": "llama", "dtype": torch.float16, "inference_tp": 1, "inference_pp": 1}
WEIGHTS = {"layer.weight": torch.ones(2).to(torch.float8_e4m3fn), "layer.weights_scaling_factor": torch.ones(1)}


@pytest.fixture(autouse=True)
def local_spec():
    with patch(f"{HERE}.spec_of", return_value="local") as spec, patch(f"{HERE}.unwrap", side_effect=lambda model: model):
        yield spec


def writer(*, ranks=1, quantization=None, weights=WEIGHTS, config=True):
    def write(*, model, decoder_type, dtype, export_dir, inference_tensor_parallel, inference_pipeline_parallel):
        assert (model, decoder_type, dtype) == ("model", "llama", torch.float16)
        write.sizes = (inference_tensor_parallel, inference_pipeline_parallel)
        if config:
            (export_dir / "config.json").write_text(json.dumps({"quantization": quantization or {"quant_algo": "FP8"}}))
        for rank in range(ranks):
            save_file(weights, export_dir / f"rank{rank}.safetensors")

    return write


def test_whole_exports_appear_with_the_tokenizer(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    write = writer(ranks=2)
    sizes = ENGINE | {"inference_tp": 2}
    out = export_trtllm("model", tmp_path / "out", write, topology=Topology(), tokenizer_dir=tmp_path / "tok", **sizes)
    assert write.sizes == (2, 1)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "rank0.safetensors", "rank1.safetensors", "tokenizer.json"]
    with pytest.raises(CheckpointError, match="out"):
        export_trtllm("model", out, write, topology=Topology(), **sizes)
    export_trtllm("model", out, writer(), topology=Topology(), overwrite=True, **ENGINE)
    assert not (out / "rank1.safetensors").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (writer(config=False), "wrote no config.json"),
        (writer(ranks=0), "wrote no rank0.safetensors for an engine of 1 ranks"),
        (writer(quantization={"quant_algo": None}), "is not quantised"),
        (writer(weights={"layer.weight": torch.ones(1)}), "is not quantised"),
        (writer(weights=WEIGHTS | {"norm": torch.tensor([float("nan")])}), "1 tensors that are not finite, first norm"),
    ],
)
def test_what_modelopt_left_undone_is_said_and_removed(tmp_path, write, message):
    with pytest.raises(CheckpointError, match=message):
        export_trtllm("model", tmp_path / "out", write, topology=Topology(), **ENGINE)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_raises_leaves_nothing(tmp_path):
    def full_disk(**_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export_trtllm("model", tmp_path / "out", full_disk, topology=Topology(), **ENGINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("topology", "spec", "dtype", "message"),
    [
        (Topology(tp=2), "local", torch.float16, "written from one rank, not from TP2PP1: use export_format='hf'"),
        (Topology(), "te", torch.float16, "spec te: quantise with spec local, or use export_format='hf'"),
        (Topology(), "local", torch.float32, "not torch.float32"),
    ],
)
def test_what_modelopt_cannot_write_is_refused_first(tmp_path, local_spec, topology, spec, dtype, message):
    local_spec.return_value = spec
    with pytest.raises(ConfigError, match=message):
        export_trtllm("model", tmp_path / "out", None, topology=topology, **ENGINE | {"dtype": dtype})
    assert not list(tmp_path.iterdir())


def test_artifacts_are_the_tokenizers_files(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        (source / name).write_text(name)
    assert save_artifacts(out) == []
    assert save_artifacts(out, tokenizer_dir=source) == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def _really(name):
    """A quantised model through ModelOpt's own writer, and its weights dequantised beside those in memory."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import load_file

    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
    from nemo_opt.quantize.quantizer import Quantizer

    topology = initialize(Topology.from_name(name))
    sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    chunks = build_model(preset("tiny", vocab_size=128, max_position_embeddings=64, **sizes), topology, spec="local", seed=5)
    batch = {"tokens": torch.arange(32).view(2, 16), "position_ids": torch.arange(16).expand(2, 16), "attention_mask": None}
    with tempfile.TemporaryDirectory() as folder:
        quantizer = Quantizer(QuantizationConfig(algorithm="fp8"), ExportConfig(path=Path(folder) / "out", dtype="16"))
        quantizer.quantize(chunks, calibration_loop([batch]))
        out = quantizer.export(chunks)
        config, stored = json.loads((out / "config.json").read_text()), load_file(out / "rank0.safetensors")
    dense = chunks[0].decoder.layers[0].self_attention.linear_proj
    written = stored["transformer.layers.0.attention.dense.weight"].float()
    written *= stored["transformer.layers.0.attention.dense.weights_scaling_factor"]
    return SimpleNamespace(algo=config["quantization"]["quant_algo"], written=written, memory=dense.weight_quantizer(dense.weight).detach())


@pytest.mark.ranks
def test_modelopt_still_writes_the_local_spec(ranks):
    (found,) = ranks(1).run(_really, "TP1PP1")
    assert found.algo == "FP8"
    torch.testing.assert_close(found.written, found.memory, rtol=1e-6, atol=0)
