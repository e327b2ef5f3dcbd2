"""The teacher: built on the active topology from a checkpoint or a Hugging Face directory, complete, frozen, in evaluation mode.

Where its vocabulary has another number of rows than the student's, it is built with the student's, so that tensor-parallel ranks hold the
same tokens of both: rows that it lacks are zero, rows that the student lacks are dropped. The losses compare `compared_vocabulary` tokens.
"""

from pathlib import Path
from typing import Any

import nemo_opt._stack

from megatron.core.models.gpt import GPTModel

from nemo_opt.checkpoint.load import restore_model
from nemo_opt.collective import on_first
from nemo_opt.data.tokenizer import Tokenizer, load_tokenizer
from nemo_opt.distill.teacher import check_same_tokens, shared_vocabulary, teacher_sizes
from nemo_opt.errors import ConfigError
from nemo_opt.models.build import Spec, build_model, check_vocabulary, model_config_of
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import import_hf
from nemo_opt.models.huggingface_config import is_huggingface
from nemo_opt.models.init import clear_vocabulary
from nemo_opt.models.shards import parameter_shards
from nemo_opt.parallel import Topology, current_topology

__all__ = ["SHARED_VOCABULARY", "compared_vocabulary", "teacher_provider"]

SHARED_VOCABULARY = "nemo_opt_shared_vocabulary"
"""Attribute of a teacher whose vocabulary was aligned: the number of tokens that the student's has too."""


def teacher_provider(
    config: ModelConfig | None,
    ckpt_path: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    trainer: Any = None,
    *,
    spec: Spec | None = None,
    vocab_size: int | None = None,
) -> GPTModel:
    """Builds the teacher's chunk of this rank and loads its weights; a collective call, under NeMo's name and signature.

    A module-level function, so that `(teacher_provider, args, kwargs)` can be pickled and handed to ModelOpt as a teacher.

    Args:
        config: the sizes expected; None accepts those that are found.
        ckpt_path: a checkpoint of nemo_opt, or a Hugging Face directory.
        tokenizer: the student's. Refused if its vocabulary is larger than the teacher's, or if the teacher's own has other words.
        trainer: accepted for NeMo's callers and not used. NeMo reads from it how strictly to load; here every weight must be there.
        spec: layer spec; None takes the device's default.
        vocab_size: the student's. The teacher's may differ by rows that are no tokens of `tokenizer`; it is aligned then.

    Raises:
        CheckpointError: nothing is there, or weights are missing, unexpected, truncated or of other shapes.
        ConfigError: sizes or vocabularies disagree, the teacher is quantised, or no topology is active.

    """
    del trainer
    topology = _active_topology()
    path = Path(ckpt_path)
    sizes, shared = on_first(lambda: _checked(path, config, tokenizer, vocab_size))
    aligned = sizes if vocab_size is None else sizes.with_(vocab_size=vocab_size)
    teacher = _from_hf(path, aligned, topology, spec) if is_huggingface(path) else _from_checkpoint(path, aligned, topology, spec)
    if aligned != sizes:
        clear_vocabulary(parameter_shards([teacher]), shared)
        setattr(teacher, SHARED_VOCABULARY, shared)
    teacher.requires_grad_(False)
    return teacher.eval()


def compared_vocabulary(teacher: GPTModel) -> int:
    """The tokens of which both models know the logit: those of the vocabulary, or of its part that an aligned teacher has."""
    return int(getattr(teacher, SHARED_VOCABULARY, model_config_of(teacher).vocab_size))


def _active_topology() -> Topology:
    topology = current_topology()
    if topology is None:
        raise ConfigError("no topology is active: call nemo_opt.parallel.initialize before building the teacher")
    if topology.vp > 1:
        raise ConfigError(f"vp {topology.vp}: distillation does not run on the interleaved pipeline schedule; set vp 1")
    return topology


def _checked(
    path: Path, expected: ModelConfig | None, tokenizer: Tokenizer | str | Path | None, vocab_size: int | None
) -> tuple[ModelConfig, int]:
    """The teacher's sizes, and the rows that its vocabulary shares with the student's; refuses whatever headers show to be wrong."""
    found = teacher_sizes(path)
    if expected is not None and (differences := _differences(expected, found)):
        raise ConfigError(f"the teacher at {path} is not of the expected sizes: {differences}; give its own sizes or another checkpoint")
    loaded = None if tokenizer is None else tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    shared = shared_vocabulary(vocab_size or found.vocab_size, found.vocab_size, None if loaded is None else loaded.vocab_size)
    if loaded is not None:
        check_vocabulary(found, loaded.vocab_size, allow_unused_rows=True)
        check_same_tokens(path, loaded.path)
    return found, shared


def _from_hf(path: Path, config: ModelConfig, topology: Topology, spec: Spec | None) -> GPTModel:
    chunks = build_model(config, topology, spec=spec, seed=None)
    import_hf(path, chunks, any_vocabulary=True)
    return chunks[0]


def _from_checkpoint(path: Path, config: ModelConfig, topology: Topology, spec: Spec | None) -> GPTModel:
    chunks, _ = restore_model(path, topology, spec=spec, vocab_size=config.vocab_size)
    return chunks[0]


def _differences(expected: ModelConfig, found: ModelConfig) -> str:
    ours, theirs = expected.to_dict(), found.to_dict()
    ours["kv_channels"], theirs["kv_channels"] = expected.head_dim, found.head_dim
    return ", ".join(f"{name} {ours[name]!r} expected, {theirs[name]!r} found" for name in ours if ours[name] != theirs[name])
