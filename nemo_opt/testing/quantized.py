"""A small quantised model at any layout, and batches for it: what tests of exports and of their proofs start from."""

import contextlib
import io
from typing import Any

import nemo_opt._stack

import torch

from nemo_opt.models.build import Spec, build_model
from nemo_opt.models.config import ModelConfig, preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize.calibration import calibration_loop
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.quantize.quantizer import Quantizer

__all__ = ["SMALL", "labelled_batches", "quantization", "small_quantized"]

SMALL = preset(
    "tiny",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=120,  # eight rows of padding
    max_position_embeddings=64,
)
"""Two layers with grouped queries; every algorithm's blocks fit, at tensor parallel sizes 1 and 2."""

_LENGTH = 16


def quantization(algorithm: str, **settings: Any) -> QuantizationConfig:
    """Of an algorithm, with blocks that fit `SMALL`."""
    blocks: dict[str, Any] = {"awq_block_size": 16, "fp8_block_shape": (16, 32)}
    return QuantizationConfig(algorithm=algorithm, **(blocks | settings))


def small_quantized(
    algorithm: str, topology: Topology, *, model: ModelConfig = SMALL, spec: Spec = "te", seed: int = 5, **settings: Any
) -> list[Any]:
    """A calibrated model in evaluation mode, as this rank's chunks; the same model at every layout. Collective.

    The weights of its norms differ, so that what is folded into them in the wrong order shows.
    """
    chunks = build_model(model, topology, spec=spec, seed=seed)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float32))
    quantizer = Quantizer(quantization(algorithm, **settings), ExportConfig(path="unused", export_format="hf"))
    with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints a table of all quantizers
        quantizer.quantize(chunks, calibration_loop(labelled_batches(4, vocab_size=model.vocab_size)))
    chunks[0].eval()
    return chunks


def labelled_batches(count: int, *, vocab_size: int = SMALL.vocab_size, seed: int = 3) -> list[dict[str, Any]]:
    """Random tokens as batches of two rows of 16; equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocab_size, (2, _LENGTH + 1), generator=generator)
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(2, _LENGTH),
                "position_ids": torch.arange(_LENGTH).expand(2, _LENGTH).contiguous(),
                "attention_mask": None,
            }
        )
    return batches
