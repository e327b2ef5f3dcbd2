"""A byte-level BPE tokenizer: trained here, or read from any directory of Hugging Face tokenizer files.

Decisions:
- `tokenizer.json` is read by the `tokenizers` library directly: no code of the directory runs and transformers is not needed.
- The files written here open with `transformers.AutoTokenizer`.
- `Tokenizer` carries the few attributes that Megatron's GPTDataset asks for (eod, pad, unique_identifiers, ...). Where there is no padding
  token of its own, `pad` is -1, Megatron's value for "never occurs", so that no real token is taken for padding.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from nemo_opt.errors import ConfigError, DataError

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]

_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
_MIN_VOCAB_SIZE = 256 + 3  # every byte and the three special tokens
_NO_PAD = -1


class Tokenizer:
    """Text to token numbers and back.

    Attributes:
        path: the directory it was read from.
        vocab_size: tokens including the special ones.
        eos_id: ends every document.
        bos_id: begins a text for models that want it; None when the tokenizer has none.
        pad: padding, or -1 when the tokenizer has none of its own.
    """

    def __init__(self, backend: tokenizers.Tokenizer, path: Path, *, eos_id: int, bos_id: int | None, pad_id: int | None) -> None:
        self._backend = backend
        self.path = path
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.pad = pad_id if pad_id is not None and pad_id != eos_id else _NO_PAD
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`; no special token is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token numbers."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    # What Megatron's datasets ask of a tokenizer.

    @property
    def eod(self) -> int:
        """End of document, Megatron's name for `eos_id`."""
        return self.eos_id

    @property
    def eos(self) -> int:
        """End of sequence, Megatron's name for `eos_id`."""
        return self.eos_id

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        """Special tokens that padding must not collide with."""
        named = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        return {name: token for name, token in named.items() if token is not None}

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Keys of Megatron's index cache: the content counts, not the place."""
        return {"class": "nemo_opt.Tokenizer", "sha256": self.fingerprint}


def train_tokenizer(documents: Iterable[str], vocab_size: int, out_dir: str | Path) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` tokens and saves it; the same documents give the same files.

    Raises:
        ConfigError: `vocab_size` cannot hold every byte and the special tokens.
        DataError: the documents are empty or too small for that many tokens.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size {vocab_size} < {_MIN_VOCAB_SIZE} (every byte and {_BOS} {_EOS} {_PAD})")
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=[_BOS, _EOS, _PAD], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(documents, trainer)
    if (reached := backend.get_vocab_size()) != vocab_size:
        raise DataError(f"the documents give a vocabulary of {reached}, {vocab_size} asked for; use more text or a smaller vocabulary")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write(out_dir / "tokenizer.json", backend.to_str(pretty=True))
    _write(out_dir / "tokenizer_config.json", json.dumps(_hf_config(), indent=2))
    return load_tokenizer(out_dir)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads a directory of Hugging Face tokenizer files, whoever wrote it.

    Raises:
        DataError: `tokenizer.json` is missing, truncated or of another format, or no end-of-sequence token is named.
    """
    directory = Path(directory)
    backend = _backend(directory)
    tokens = _special_tokens(directory, backend)
    if (eos_id := tokens["eos_token"]) is None:
        raise DataError(f"{directory} names no eos_token that is in the vocabulary; add it to tokenizer_config.json")
    return Tokenizer(backend, directory, eos_id=eos_id, bos_id=tokens["bos_token"], pad_id=tokens["pad_token"])


def _hf_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }


def _write(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader never meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise DataError(
            f"{file} does not exist ({directory}: {found}); a tokenizer in another form becomes one by "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for every malformed file
        raise DataError(f"{file} cannot be read ({error}); it is truncated or of another format") from None


def _special_tokens(directory: Path, backend: tokenizers.Tokenizer) -> dict[str, int | None]:
    """Token numbers by Hugging Face's names, from the first file that names each."""
    settings = [_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    model = [_json(directory / name) for name in ("generation_config.json", "config.json")]
    found: dict[str, int | None] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        texts = [_text(values.get(name)) for values in settings]
        ids = [_id(values.get(f"{name}_id")) for values in model]
        candidates = [backend.token_to_id(text) for text in texts if text is not None] + ids
        found[name] = next((token for token in candidates if token is not None), None)
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); it is truncated or of another format") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _id(value: Any) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None
