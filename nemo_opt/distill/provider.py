"""The teacher: built on the active topology from a checkpoint or a Hugging Face directory, complete, frozen, in evaluation mode."""

from pathlib import Path
from typing import Any

import nemo_opt._stack

from megatron.core.models.gpt import GPTModel

from nemo_opt.checkpoint.load import restore_model
from nemo_opt.data.tokenizer import Tokenizer, load_tokenizer
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.build import Spec, build_model, check_vocabulary, model_config_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import config_from_hf, import_hf
from nemo_opt.parallel import Topology, current_topology

__all__ = ["teacher_provider"]


def teacher_provider(
    config: ModelConfig | None,
    ckpt_path: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    trainer: Any = None,
    *,
    spec: Spec | None = None,
) -> GPTModel:
    """Builds the teacher's chunk of this rank and loads its weights; a collective call, under NeMo's name and signature.

    A module-level function, so that `(teacher_provider, args, kwargs)` can be pickled and handed to ModelOpt as a teacher.

    Args:
        config: the sizes expected; None accepts those of the checkpoint.
        ckpt_path: a checkpoint of nemo_opt, or a Hugging Face directory.
        tokenizer: refused if its vocabulary is larger than the teacher's.
        trainer: accepted for NeMo's callers and not used. NeMo reads from it how strictly to load; here every weight must be there.
        spec: layer spec; None takes that of the checkpoint, or the device's default.

    Raises:
        CheckpointError: nothing is there, or weights are missing, truncated or of other shapes.
        ConfigError: sizes or vocabularies disagree, or no topology is active.

    """
    del trainer
    topology = _active_topology()
    path = Path(ckpt_path)
    if not path.is_dir():
        raise CheckpointError(f"teacher {path} does not exist or is not a directory")
    teacher = _from_hf(path, topology, spec) if (path / "config.json").is_file() else _from_checkpoint(path, topology, spec)
    _check(model_config_of(teacher), config, tokenizer, path)
    teacher.requires_grad_(False)
    return teacher.eval()


def _active_topology() -> Topology:
    topology = current_topology()
    if topology is None:
        raise ConfigError("no topology is active: call nemo_opt.parallel.initialize before building the teacher")
    if topology.vp > 1:
        raise ConfigError(f"vp {topology.vp}: distillation does not run on the interleaved pipeline schedule; set vp 1")
    return topology


def _from_hf(path: Path, topology: Topology, spec: Spec | None) -> GPTModel:
    chunks = build_model(config_from_hf(path), topology, spec=spec, seed=None)
    import_hf(path, chunks)
    return chunks[0]


def _from_checkpoint(path: Path, topology: Topology, spec: Spec | None) -> GPTModel:
    chunks, _ = restore_model(path, topology, spec=spec)
    return chunks[0]


def _check(found: ModelConfig, expected: ModelConfig | None, tokenizer: Tokenizer | str | Path | None, path: Path) -> None:
    if expected is not None and (differences := _differences(expected, found)):
        raise ConfigError(f"the teacher at {path} is not of the expected sizes: {differences}; give its own sizes or another checkpoint")
    if tokenizer is not None:
        loaded = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        check_vocabulary(found, loaded.vocab_size, allow_unused_rows=True)


def _differences(expected: ModelConfig, found: ModelConfig) -> str:
    ours, theirs = expected.to_dict(), found.to_dict()
    ours["kv_channels"], theirs["kv_channels"] = expected.head_dim, found.head_dim
    return ", ".join(f"{name} {ours[name]!r} expected, {theirs[name]!r} found" for name in ours if ours[name] != theirs[name])
