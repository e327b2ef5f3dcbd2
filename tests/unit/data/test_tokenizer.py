import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_opt.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_opt.errors import ConfigError, DataError


@pytest.fixture
def copy_of(tokenizer, tmp_path):
    """A directory with the tokenizer's two files, to be damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer.path / name).read_bytes())
    return tmp_path


def test_training_is_deterministic(documents, tokenizer, tmp_path):
    again = train_tokenizer(documents, 512, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer.path / "tokenizer.json").read_bytes()
    assert again.vocab_size == 512


def test_tokens_are_words_not_bytes(documents, tokenizer):
    """Origin of the bound: 2.2 bytes a token with 512 tokens on this corpus; bytes alone would give 1."""
    assert len(documents[0].encode()) / len(tokenizer.encode(documents[0])) > 1.8


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=("Cs",))))
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_batch_equals_single(documents, tokenizer):
    assert tokenizer.encode_batch(documents[:3]) == [tokenizer.encode(document) for document in documents[:3]]


def test_opens_with_transformers(documents, tokenizer):
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
    assert other.encode(documents[1], add_special_tokens=False) == tokenizer.encode(documents[1])
    assert (other.eos_token_id, other.bos_token_id, other.pad_token_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad)
    assert len(other) == tokenizer.vocab_size


def test_special_tokens_are_skipped_or_shown(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("word"), tokenizer.eod]
    assert tokenizer.decode(ids) == "word"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin_of_text|>word<|end_of_text|>"


def test_what_megatron_asks_for(tokenizer):
    assert tokenizer.eod == tokenizer.eos == tokenizer.eos_id
    assert tokenizer.pad not in tokenizer.special_tokens_dict.values()
    assert json.dumps(tokenizer.unique_identifiers)


def test_special_tokens_as_objects_and_from_the_model_config(copy_of, tokenizer):
    (copy_of / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end_of_text|>"}}))
    assert load_tokenizer(copy_of).eos_id == tokenizer.eos_id
    (copy_of / "tokenizer_config.json").unlink()
    (copy_of / "config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 7], "bos_token_id": 5}))
    loaded = load_tokenizer(copy_of)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad) == (tokenizer.eos_id, 5, -1)


def test_padding_that_is_the_end_token_is_no_padding(copy_of, tokenizer):
    """Otherwise every end of a document would be masked from the loss."""
    (copy_of / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}))
    assert load_tokenizer(copy_of).pad == -1


@pytest.mark.parametrize("size", [0, 258])
def test_vocabulary_without_room_for_bytes_is_refused(documents, tmp_path, size):
    with pytest.raises(ConfigError, match="259"):
        train_tokenizer(documents, size, tmp_path)


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="2048 asked for"):
        train_tokenizer(["too little"], 2048, tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_directories_are_refused(copy_of):
    whole = (copy_of / "tokenizer.json").read_text()
    (copy_of / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        load_tokenizer(copy_of)
    (copy_of / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(copy_of)
    with pytest.raises(DataError, match="no such directory"):
        load_tokenizer(copy_of / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "holds a list"), ("{}", "no eos_token"), ('{"eos_token": "</s>"}', "no eos_token")]
)
def test_bad_tokenizer_config_is_refused(copy_of, content, message):
    (copy_of / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(copy_of)
