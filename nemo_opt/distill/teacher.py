"""A teacher before it is loaded: what its directory says of it, and which tokens it has in common with the student. Loads no torch.

Models of one family share a tokenizer but not always the number of rows in their embeddings, which are padded to sizes that suited whoever
trained them. Logits are compared token by token, so such rows are no obstacle, as long as no token selects them.
"""

from pathlib import Path

from nemo_opt.checkpoint.info import INFO_NAME, TOKENIZER_NAME, verify
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface_config import config_from_hf, is_huggingface, read_json
from nemo_opt.models.huggingface_names import check_weights
from nemo_opt.models.safetensors_dir import SafetensorsReader

__all__ = ["check_same_tokens", "shared_vocabulary", "teacher_sizes"]


def teacher_sizes(path: str | Path) -> ModelConfig:
    """Sizes of the teacher in a checkpoint or a Hugging Face directory, whose files must be there and of the right length.

    Reads headers alone: milliseconds, whatever the teacher's size.

    Raises:
        CheckpointError: There is no model, or its files are missing, truncated or of other weights; names them.
        ConfigError: It is quantised, or no model that is supported.

    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(f"teacher {root} does not exist: give a checkpoint or a Hugging Face directory")
    if not root.is_dir():
        raise CheckpointError(f"teacher {root} is a file: give the directory of a checkpoint, or a Hugging Face directory")
    if is_huggingface(root):
        config = config_from_hf(root)
        check_weights(SafetensorsReader(root, framework="np"), config)
        return config
    if not (root / INFO_NAME).is_file():
        raise CheckpointError(f"teacher {root} is neither a checkpoint ({INFO_NAME}) nor a Hugging Face directory (config.json)")
    info = verify(root, deep=False)
    if info.has_modelopt_state:
        raise ConfigError(
            f"teacher {root} is quantised or converted by ModelOpt, and would teach its rounding: give the model that it was made from"
        )
    return info.model


def shared_vocabulary(student: int, teacher: int, tokenizer: int | None) -> int:
    """The number of rows that both vocabularies have, if all tokens are among them.

    Args:
        student: `vocab_size` of the student.
        teacher: That of the teacher.
        tokenizer: Number of tokens of their tokenizer; None where none is given.

    Raises:
        ConfigError: They differ, and one may have tokens that the other lacks.

    """
    shared = min(student, teacher)
    sizes = f"the vocabulary of the student has {student} rows, of the teacher {teacher}"
    if student != teacher and tokenizer is None:
        raise ConfigError(f"{sizes}: give their tokenizer, which shows whether the rows beyond {shared} are tokens or padding")
    if student != teacher and tokenizer is not None and tokenizer > shared:
        raise ConfigError(
            f"{sizes}, their tokenizer has {tokenizer} tokens: {tokenizer - shared} of them would have no logit in one model; "
            "give a teacher that was trained with the student's tokenizer"
        )
    return shared


def check_same_tokens(path: str | Path, tokenizer_dir: str | Path) -> None:
    """Refuses a teacher at `path` whose own tokenizer, where it lies beside it, gives other numbers to the words than the student's.

    Tokens that were added to the vocabulary (chat templates) may differ.

    Raises:
        ConfigError: Names a word and both numbers.

    """
    root = Path(path)
    theirs = (root if is_huggingface(root) else root / TOKENIZER_NAME) / "tokenizer.json"
    ours = Path(tokenizer_dir) / "tokenizer.json"
    if not theirs.is_file() or theirs.read_bytes() == ours.read_bytes():
        return
    our_words, their_words = _words(ours), _words(theirs)
    if our_words == their_words:
        return
    word = min(dict(our_words.items() ^ their_words.items()))
    raise ConfigError(
        f"the tokenizer of the teacher, {theirs}, is not the student's, {ours}: {word!r} is token {their_words.get(word)} there and "
        f"{our_words.get(word)} here; give a teacher that was trained with the student's tokenizer"
    )


def _words(path: Path) -> dict[str, int]:
    model = read_json(path).get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # Unigram: [word, score] in order
        return {str(entry[0]): number for number, entry in enumerate(words)}
    if not isinstance(words, dict):
        raise CheckpointError(f"{path} holds no vocabulary: it is truncated or of another format")
    return words
