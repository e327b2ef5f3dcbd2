import pickle

import nemo_opt._stack

import pytest
import torch

from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.data.corpus import builtin_documents
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill import provider
from nemo_opt.distill.provider import teacher_provider
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.huggingface import export_hf
from nemo_opt.parallel import Topology


@pytest.fixture
def checkpoint(make, world, tmp_path):
    save_checkpoint(tmp_path / "teacher", [make.gpt(make.teacher, 5)], topology=world)
    return tmp_path / "teacher"


@pytest.fixture
def hf_directory(make, tmp_path):
    export_hf([make.gpt(make.teacher, 5)], tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", ["checkpoint", "hf_directory"])
def test_teacher_has_its_weights_and_is_frozen(make, kind, request):
    """Also through pickle, as ModelOpt's callers send it."""
    function, arguments = pickle.loads(pickle.dumps((teacher_provider, (make.teacher, request.getfixturevalue(kind), None, None))))
    teacher = function(*arguments, spec="local")
    expected = dict(make.gpt(make.teacher, 5).named_parameters())
    found = dict(teacher.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_sizes_are_taken_from_the_checkpoint(make, checkpoint):
    assert teacher_provider(None, checkpoint, spec="local").config.hidden_size == make.teacher.hidden_size


def test_other_sizes_are_refused(make, checkpoint):
    with pytest.raises(ConfigError, match="num_layers 2 expected, 3 found, hidden_size 16 expected, 24 found"):
        teacher_provider(make.student, checkpoint, spec="local")


def test_another_tokenizer_is_refused(checkpoint, tmp_path):
    tokenizer = train_tokenizer(builtin_documents()[:3], 300, tmp_path / "tokenizer")
    for given in (tokenizer, tokenizer.path):
        with pytest.raises(ConfigError, match="300 tokens"):
            teacher_provider(None, checkpoint, given, spec="local")


def test_missing_weights_are_refused(checkpoint, hf_directory, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        teacher_provider(None, tmp_path / "nowhere")
    for file in checkpoint.glob("weights/*.distcp"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        teacher_provider(None, checkpoint)
    for file in hf_directory.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        teacher_provider(None, hf_directory)


@pytest.mark.parametrize(("topology", "message"), [(None, "no topology is active"), (Topology(pp=2, vp=2), "vp 2")])
def test_layouts_without_a_teacher_are_refused(monkeypatch, tmp_path, topology, message):
    monkeypatch.setattr(provider, "current_topology", lambda: topology)
    with pytest.raises(ConfigError, match=message):
        teacher_provider(None, tmp_path)
