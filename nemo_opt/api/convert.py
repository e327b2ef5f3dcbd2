"""import_ckpt() and export_ckpt(): Hugging Face directories and checkpoints, one into the other, at any layout.

A quantised checkpoint becomes a quantised directory, which is proven on random tokens, since no data is at hand here, before it appears.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks
from nemo_opt.api._session import directory_bytes, session, world_size
from nemo_opt.api.results import ExportResult, ImportResult
from nemo_opt.checkpoint.info import CheckpointInfo, read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.models.build import Spec, build_model
from nemo_opt.models.huggingface import TOKENIZER_FILES, export_hf, import_hf
from nemo_opt.models.huggingface_config import config_from_hf
from nemo_opt.parallel import Topology
from nemo_opt.quantize.export import ExportPlan, export_quantized_hf
from nemo_opt.quantize.proof import prove_export, random_batches

__all__ = ["export_ckpt", "import_ckpt"]

_PROOF_LENGTH = 128
"""Tokens of a row that a quantised export is proven on."""


def import_ckpt(*, source: str, output: str, topology: Topology, spec: Spec | None = None, overwrite: bool = False) -> ImportResult:
    """Turns a Hugging Face Llama into a checkpoint; no rank holds the whole model. Collective.

    Raises:
        NemoOptError: No supported Llama, damaged weights, or a layout that does not fit.

    """
    checks.check_import_ckpt(source=source, output=output, topology=topology, world_size=world_size(), overwrite=overwrite)
    model = config_from_hf(source)
    with session(topology, model) as job, tempfile.TemporaryDirectory(prefix="nemo_opt_tokenizer_") as folder:
        chunks = build_model(model, job.topology, spec=spec, seed=None)
        import_hf(source, chunks)
        tokenizer_dir = _copy_tokenizer(Path(source), Path(folder))
        save_checkpoint(output, chunks, topology=job.topology, model_config=model, tokenizer_dir=tokenizer_dir, overwrite=overwrite)
        return ImportResult(**job.facts(chunks), path=output, source=source, bytes_after=directory_bytes(output))


def export_ckpt(*, checkpoint: str, output: str, topology: Topology, spec: Spec | None = None, overwrite: bool = False) -> ExportResult:
    """Turns a checkpoint into a directory that transformers opens, or, if it is quantised, that inference engines do. Collective.

    Raises:
        NemoOptError: A missing or damaged checkpoint, a layout that does not fit, a quantised model that no engine reads from such a
            directory, or one whose export is not proven.

    """
    checks.check_export_ckpt(checkpoint=checkpoint, output=output, topology=topology, world_size=world_size(), overwrite=overwrite)
    info = read_info(checkpoint)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(checkpoint, job.topology, spec=spec)
        if info.has_modelopt_state:
            _export_quantized(chunks, output, info, overwrite)
        else:
            export_hf(chunks, output, tokenizer_dir=info.tokenizer_dir, overwrite=overwrite)
        return ExportResult(**job.facts(chunks), path=output, source=checkpoint, bytes_after=directory_bytes(output))


def _export_quantized(chunks: list[Any], output: str, info: CheckpointInfo, overwrite: bool) -> None:
    batches = random_batches(info.model.vocab_size, min(_PROOF_LENGTH, info.model.max_position_embeddings))

    def prove(directory: Path, plan: ExportPlan | None) -> None:
        prove_export(directory, chunks, plan, batches)

    export_quantized_hf(chunks, output, tokenizer_dir=info.tokenizer_dir, overwrite=overwrite, prove=prove)


def _copy_tokenizer(source: Path, folder: Path) -> Path | None:
    """The tokenizer's files alone: a checkpoint must not carry a second copy of the weights."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return folder if names else None
