"""Evaluation of Hugging Face directories: scales are applied, and codes that nobody describes are refused."""

import json

import pytest
import torch

from nemo_opt.api import measure
from nemo_opt.errors import CheckpointError
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.export import export_quantized_hf
from nemo_opt.testing.quantized import SMALL, labelled_batches, small_quantized


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    with parallel(Topology()) as topology:
        chunks = small_quantized("fp8", topology)
        (batch,) = labelled_batches(1)
        with torch.no_grad():
            logits = chunks[0](batch["tokens"], batch["position_ids"], None)[
                ..., : SMALL.vocab_size
            ]  # Megatron's loss counts the padding too
        path = export_quantized_hf(chunks, tmp_path_factory.mktemp("exports") / "fp8")
        return path, torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()


def test_the_loss_of_a_quantised_directory_is_the_models(directory):
    path, expected = directory
    logits, facts = measure._open_quantized(str(path))
    with parallel(Topology()):
        assert measure._mean_loss(logits, labelled_batches(1)) == pytest.approx(expected, rel=1e-6)
    assert facts["formats"] == {"FP8": 14, "unquantised": 1}
    assert 8 < facts["bits_per_weight"] < 8.1 < facts["bits_per_parameter"]


def test_codes_without_a_description_are_not_taken_for_weights(directory):
    path, _ = directory
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").unlink()
    assert not measure.is_quantized(path)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is F8_E4M3, a quantised weight, but neither config\.json .* says how"):
        measure._open_plain(str(path))
