"""TensorRT-LLM checkpoints by ModelOpt: which it writes, that they are checked, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import RopeScaling
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.export.trtllm import check_trtllm, export_trtllm
from nemo_opt.testing.quantized import SMALL, small_quantized

UNPADDED = SMALL.with_(vocab_size=128)


@pytest.fixture(scope="module")
def one():
    with parallel(Topology()) as topology:
        yield topology


def _quantized(one, algorithm, spec="local", **changes):
    return small_quantized(algorithm, one, spec=spec, model=UNPADDED.with_(**changes))


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [("fp8", "FP8"), ("int8_sq", "W8A8_SQ_PER_CHANNEL"), ("int4_awq", "W4A16_AWQ"), ("w4a8_awq", "W4A8_AWQ"), ("nvfp4", "NVFP4")],
)
def test_what_modelopt_writes_is_the_model(one, tmp_path, algorithm, said):
    directory = export_trtllm(_quantized(one, algorithm), tmp_path / "out")
    assert {path.name for path in directory.iterdir()} == {"config.json", "rank0.safetensors"}
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == said
    assert config["architecture"] == "LlamaForCausalLM"
    tensors = load_file(directory / "rank0.safetensors")
    assert tensors["transformer.layers.1.attention.qkv.weights_scaling_factor"].float().isfinite().all()
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_modelopt_cannot_write_transformer_engines_layers(one, tmp_path):
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    chunks = _quantized(one, "fp8", spec="te")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'eps'"):
        export_tensorrt_llm_checkpoint(chunks[0], "llama", torch.bfloat16, str(tmp_path), 1, 1)
    with pytest.raises(ConfigError, match=r"layer spec local only, this model has te: use export_format='hf', which TensorRT-LLM reads"):
        export_trtllm(chunks, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "te"}, "this model has te"),
        ({"world_size": 2}, "written from one rank, here are 2"),
        ({"inference_tp": 2}, "inference_tp 2, inference_pp 1: only 1, 1"),
        ({"inference_pp": 2}, "inference_tp 1, inference_pp 2: only 1, 1"),
    ],
)
def test_what_is_not_written_is_refused_at_once(changes, message):
    check_trtllm(spec="local", world_size=1)
    with pytest.raises(ConfigError, match=message + ".*use export_format='hf'"):
        check_trtllm(**({"spec": "local", "world_size": 1} | changes))


@pytest.mark.parametrize("algorithm", ["mxfp8", "block_fp8"])
def test_formats_without_an_engine_are_refused(one, tmp_path, algorithm):
    with pytest.raises(ConfigError, match=f"have no {algorithm} in this form .*use export_format='hf'"):
        export_trtllm(_quantized(one, algorithm), tmp_path / "out")


def test_another_decoder_is_refused(one, tmp_path):
    with pytest.raises(ConfigError, match="decoder_type 'gpt': only llama"):
        export_trtllm(_quantized(one, "fp8"), tmp_path / "out", decoder_type="gpt")


def test_an_existing_directory_is_refused(one, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_trtllm(_quantized(one, "fp8"), tmp_path)


def _spoiled(edit):
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    def write(model, decoder_type, dtype, folder, *sizes):
        export_tensorrt_llm_checkpoint(model, decoder_type, dtype, folder, *sizes)
        tensors = load_file(f"{folder}/rank0.safetensors")
        edit(tensors)
        save_file(tensors, f"{folder}/rank0.safetensors")

    return write


def test_a_wrong_scale_is_found_and_nothing_is_left(one, tmp_path):
    def double(tensors):
        tensors["transformer.layers.1.mlp.gate.weights_scaling_factor"] *= 2

    with pytest.raises(CheckpointError, match=r"ModelOpt wrote transformer\.layers\.1\.mlp\.gate with a relative error of 1"):
        export_trtllm(_quantized(one, "fp8"), tmp_path / "out", write=_spoiled(double))
    assert not list(tmp_path.iterdir())


def test_a_failure_of_modelopt_is_told_with_the_alternative(one, tmp_path):
    def fail(*_):
        raise RuntimeError("no such engine")

    with pytest.raises(
        CheckpointError, match="ModelOpt's TensorRT-LLM export failed: RuntimeError: no such engine; use export_format='hf'"
    ):
        export_trtllm(_quantized(one, "fp8"), tmp_path / "out", write=fail)
    assert not list(tmp_path.iterdir())


def test_rope_scaling_is_written_with_its_numbers(one, tmp_path):
    """Upstream writes the kind alone, with which an engine takes the numbers of another model."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    scaling = RopeScaling(factor=32.0, original_max_position_embeddings=32)
    chunks = _quantized(one, "fp8", rope_scaling=scaling)
    export_tensorrt_llm_checkpoint(chunks[0], "llama", torch.bfloat16, str(tmp_path / "upstream"), 1, 1)
    assert json.loads((tmp_path / "upstream" / "config.json").read_text())["rotary_scaling"] == {"type": "llama3"}
    ours = json.loads((export_trtllm(chunks, tmp_path / "ours") / "config.json").read_text())
    assert ours["rotary_scaling"] == {"type": "llama3", **asdict(scaling)}


def test_a_config_that_is_not_the_models_is_refused(one, tmp_path):
    def write(model, decoder_type, dtype, folder, *sizes):
        (Path(folder) / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))

    with pytest.raises(CheckpointError, match=r"is not the model's, \(written, model\): .*'num_hidden_layers': \(3, 2\)"):
        export_trtllm(_quantized(one, "fp8"), tmp_path / "out", write=write)
