"""import_ckpt() and export_ckpt(): Hugging Face directories and checkpoints, one into the other, at any layout."""

import shutil
import tempfile
from pathlib import Path

import nemo_opt._stack

from nemo_opt.api import checks
from nemo_opt.api._session import directory_bytes, session, world_size
from nemo_opt.api.results import ExportResult, ImportResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.models.build import Spec, build_model
from nemo_opt.models.huggingface import TOKENIZER_FILES, export_hf, import_hf
from nemo_opt.models.huggingface_config import config_from_hf
from nemo_opt.parallel import Topology

__all__ = ["export_ckpt", "import_ckpt"]


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
    """Turns an unquantised checkpoint into a directory that transformers opens. Collective.

    Raises:
        NemoOptError: A missing, damaged or quantised checkpoint, or a layout that does not fit.

    """
    checks.check_export_ckpt(checkpoint=checkpoint, output=output, topology=topology, world_size=world_size(), overwrite=overwrite)
    info = read_info(checkpoint)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(checkpoint, job.topology, spec=spec)
        export_hf(chunks, output, tokenizer_dir=info.tokenizer_dir, overwrite=overwrite)
        return ExportResult(**job.facts(chunks), path=output, source=checkpoint, bytes_after=directory_bytes(output))


def _copy_tokenizer(source: Path, folder: Path) -> Path | None:
    """The tokenizer's files alone: a checkpoint must not carry a second copy of the weights."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return folder if names else None
