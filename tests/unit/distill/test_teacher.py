"""What is known of a teacher from its headers alone."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nemo_opt.checkpoint.info import CheckpointInfo, write_info
from nemo_opt.checkpoint.manifest import hash_files, list_files, write_manifest
from nemo_opt.data.corpus import builtin_documents
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill.teacher import check_same_tokens, shared_vocabulary, teacher_sizes
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface_config import config_to_hf
from nemo_opt.models.huggingface_names import hf_shapes
from nemo_opt.parallel import Topology

MODEL = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1, vocab_size=300)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint without weights."""
    return make(tmp_path / "checkpoint")


def make(path, **changes):
    path.mkdir()
    write_info(CheckpointInfo(path=path, model=MODEL, topology=Topology(), **changes), path)
    (path / "weights").mkdir()
    (path / "weights" / "part").write_bytes(b"12345678")
    write_manifest(path, hash_files(path, list_files(path)))
    return path


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face directory."""
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(MODEL, dtype="float16")))
    save_file({name: np.zeros(shape, np.float16) for name, shape in hf_shapes(MODEL).items()}, path / "model.safetensors")
    return path


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_sizes(checkpoint, hf):
    assert teacher_sizes(checkpoint) == teacher_sizes(str(hf)) == MODEL


def test_what_is_no_teacher(tmp_path, checkpoint):
    for path, message in (
        (tmp_path / "nowhere", "does not exist: give a checkpoint or"),
        (checkpoint / "weights" / "part", "is a file: give the directory"),
        (tmp_path, r"is neither a checkpoint \(nemo_opt\.json\) nor a Hugging Face directory \(config\.json\)"),
    ):
        with pytest.raises(CheckpointError, match=rf"^teacher {path} {message}"):
            teacher_sizes(path)


def test_damaged_checkpoints(checkpoint):
    """By names and lengths: contents are compared where they are read anyway."""
    (checkpoint / "weights" / "part").write_bytes(b"87654321")
    assert teacher_sizes(checkpoint) == MODEL
    cut(checkpoint / "weights" / "part")
    with pytest.raises(CheckpointError, match="part is truncated: 7 bytes on disk, 8"):
        teacher_sizes(checkpoint)
    (checkpoint / "weights" / "part").unlink()
    with pytest.raises(CheckpointError, match="part is missing"):
        teacher_sizes(checkpoint)
    cut(checkpoint / "nemo_opt.json")
    cut(checkpoint / "nemo_opt.json")
    with pytest.raises(CheckpointError, match=r"nemo_opt\.json is damaged"):
        teacher_sizes(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no whole safetensors file"),
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight"),
        ({"model.norm.bias": np.zeros(16)}, r"does not have: model\.norm\.bias"),
        ({"lm_head.weight": np.zeros((299, 16), np.float16)}, r"lm_head\.weight has shape \(299, 16\), the model needs \(300, 16\)"),
        ({"lm_head.weight": np.zeros((300, 16), np.int8)}, r"lm_head\.weight is I8, a quantised weight"),
        (None, r"holds neither model\.safetensors nor"),
    ],
)
def test_damaged_directories(hf, change, message):
    weights = hf / "model.safetensors"
    if change:
        save_file({name: tensor for name, tensor in (load_file(weights) | change).items() if tensor is not None}, weights)
    elif change is None:
        weights.unlink()
    else:
        cut(weights)
    with pytest.raises(CheckpointError, match=message):
        teacher_sizes(hf)


def test_a_head_that_is_tied_may_be_stored(hf):
    (hf / "config.json").write_text(json.dumps(config_to_hf(MODEL.with_(tie_embeddings=True), dtype="float16")))
    assert teacher_sizes(hf).tie_embeddings


def test_quantised_teachers(tmp_path, hf):
    with pytest.raises(ConfigError, match=r"fp8 is quantised or converted by ModelOpt.*: give the model that it was made from"):
        teacher_sizes(make(tmp_path / "fp8", has_modelopt_state=True))
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"hf is quantised \(quant_method 'fp8'\): give the model that it was made from"):
        teacher_sizes(hf)


SIZES = st.integers(1, 12)


@given(SIZES, SIZES, st.none() | SIZES)
def test_vocabularies_share_what_no_token_is_beyond(student, teacher, tokenizer):
    fits = student == teacher or (tokenizer is not None and tokenizer <= min(student, teacher))
    if fits:
        assert shared_vocabulary(student, teacher, tokenizer) == min(student, teacher)
        return
    with pytest.raises(ConfigError, match=f"student has {student} rows, of the teacher {teacher}") as refusal:
        shared_vocabulary(student, teacher, tokenizer)
    if tokenizer is None:
        assert f"give their tokenizer, which shows whether the rows beyond {min(student, teacher)}" in str(refusal.value)
    else:
        lost = tokenizer - min(student, teacher)
        assert f"their tokenizer has {tokenizer} tokens: {lost} of them would have no logit" in str(refusal.value)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers of one size."""
    root = tmp_path_factory.mktemp("tokenizers")
    documents = builtin_documents()
    return [train_tokenizer(documents[start : start + 20], 300, root / str(start)).path for start in (0, 20)]


def edited(tokenizer, directory, change):
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    change(settings)
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    return directory


def test_teachers_of_the_same_words(checkpoint, hf, tokenizers):
    """Without a tokenizer of their own; with the same; with one whose added tokens differ, as in chat models."""
    ours, _ = tokenizers
    for teacher in (checkpoint, hf):
        check_same_tokens(teacher, ours)
    shutil.copytree(ours, checkpoint / "tokenizer")
    check_same_tokens(str(checkpoint), str(ours))

    def add(settings):
        settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 300, "content": "<|tool|>"})

    check_same_tokens(edited(ours, hf, add), ours)


def test_teachers_of_other_words(checkpoint, hf, tokenizers):
    ours, theirs = tokenizers
    shutil.copytree(theirs, checkpoint / "tokenizer")
    with pytest.raises(ConfigError, match="trained with the student's tokenizer"):
        check_same_tokens(checkpoint, ours)

    def swap(settings):
        words = settings["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    numbers = json.loads((ours / "tokenizer.json").read_text())["model"]["vocab"]
    message = rf"teacher, {hf}/tokenizer\.json, is not the student's, .*: 'a' is token {numbers['b']} there and {numbers['a']} here"
    with pytest.raises(ConfigError, match=message):
        check_same_tokens(edited(ours, hf, swap), ours)
    with pytest.raises(ConfigError, match=rf"'a' is token None there and {numbers['a']} here"):
        check_same_tokens(edited(ours, hf, lambda settings: settings["model"]["vocab"].pop("a")), ours)


def test_unigram_tokenizers_number_their_words_by_order(tmp_path, hf):
    ours = tmp_path / "ours"
    ours.mkdir()
    for directory, words in ((ours, ["<unk>", "a"]), (hf, ["<unk>", "a"])):
        vocabulary = [[word, -1.0] for word in words]
        (directory / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "Unigram", "vocab": vocabulary}, "directory": str(directory)})
        )
    check_same_tokens(hf, ours)
    (hf / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0], ["<unk>", 0.0]]}}))
    with pytest.raises(ConfigError, match="'<unk>' is token 1 there and 0 here"):
        check_same_tokens(hf, ours)


@pytest.mark.parametrize("content", ["{}", '{"model": []}', '{"model": {"vocab": 3}}'])
def test_a_tokenizer_without_words(hf, tokenizers, content):
    (hf / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json holds no vocabulary"):
        check_same_tokens(hf, tokenizers[0])
