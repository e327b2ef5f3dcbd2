"""What a model is used with, beside its weights: the tokenizer's files."""

import shutil
from pathlib import Path

import nemo_opt._stack

from nemo_opt.collective import on_first
from nemo_opt.models.huggingface import TOKENIZER_FILES

__all__ = ["save_artifacts"]


def save_artifacts(output_dir: str | Path, *, tokenizer_dir: str | Path | None = None) -> list[str]:
    """Copies the tokenizer into an export; collective. NeMo's function of this name also copies its own configuration, which is not ours.

    Args:
        output_dir: the export, which exists.
        tokenizer_dir: where `TOKENIZER_FILES` are looked for; None copies nothing.

    Returns:
        names of the files copied.

    """

    def copy() -> list[str]:
        names = [name for name in TOKENIZER_FILES if tokenizer_dir is not None and (Path(tokenizer_dir) / name).is_file()]
        for name in names:
            shutil.copyfile(Path(tokenizer_dir or "") / name, Path(output_dir) / name)
        return names

    return on_first(copy)
