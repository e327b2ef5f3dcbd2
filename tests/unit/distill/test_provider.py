import json
import pickle
import shutil

import nemo_opt._stack

import pytest
import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save_file

from nemo_opt.checkpoint import manifest
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.data.corpus import builtin_documents
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill import provider
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.convert import convert_to_distillation_model
from nemo_opt.distill.losses import distillation_loss_fn
from nemo_opt.distill.provider import compared_vocabulary, teacher_provider
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import export_hf
from nemo_opt.models.shards import parameter_shards
from nemo_opt.parallel import Topology, parallel
from nemo_opt.training.config import TrainingConfig
from nemo_opt.training.optimizer import build_optimizer, wrap

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
TOKENS = 260
"""Of the tokenizer in the tests of alignment."""
SMALL, LARGE = 270, 520
"""Vocabularies with rows that are no tokens; padded to 384 and 640, so that two ranks cut them in different places."""


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
    assert compared_vocabulary(teacher) == make.teacher.vocab_size


def test_sizes_are_taken_from_the_checkpoint(make, checkpoint):
    assert teacher_provider(None, checkpoint, spec="local").config.hidden_size == make.teacher.hidden_size


def test_other_sizes_are_refused(make, checkpoint):
    with pytest.raises(ConfigError, match="num_layers 2 expected, 3 found, hidden_size 16 expected, 24 found"):
        teacher_provider(make.student, checkpoint, spec="local")


def test_another_tokenizer_is_refused(checkpoint, hf_directory, tmp_path):
    tokenizer = train_tokenizer(builtin_documents()[:3], 300, tmp_path / "tokenizer")
    for given in (tokenizer, tokenizer.path):
        with pytest.raises(ConfigError, match="300 tokens"):
            teacher_provider(None, checkpoint, given, spec="local")


def test_missing_weights_are_refused(checkpoint, hf_directory, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        teacher_provider(None, tmp_path / "nowhere")
    for file in checkpoint.glob("weights/*.distcp"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        teacher_provider(None, checkpoint)
    for file in hf_directory.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        teacher_provider(None, hf_directory)


@pytest.mark.parametrize(
    ("held", "announced", "message"),
    [
        (True, False, r"missing output_layer\.weight, unexpected nothing"),
        (False, True, r"missing nothing, unexpected output_layer\.weight"),
    ],
)
def test_what_a_checkpoint_lacks_or_holds_too_much_is_named(make, world, tmp_path, held, announced, message):
    """The header announces a tied model where the weights are those of another, or the reverse."""
    save_checkpoint(tmp_path / "teacher", [make.gpt(make.teacher.with_(tie_embeddings=held))], topology=world)
    header = tmp_path / "teacher" / "nemo_opt.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"model": make.teacher.with_(tie_embeddings=announced).to_dict()}))
    manifest.write_manifest(header.parent, manifest.hash_files(header.parent, manifest.list_files(header.parent)))
    with pytest.raises(CheckpointError, match=message):
        teacher_provider(None, header.parent, spec="local")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("model.norm.weight", None, r"lacks model\.norm\.weight"), ("model.norm.bias", torch.zeros(24), r"does not have: model\.norm\.bias")],
)
def test_what_a_directory_lacks_or_holds_too_much_is_named(hf_directory, name, value, message):
    weights = load_file(hf_directory / "model.safetensors") | {name: value}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, hf_directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        teacher_provider(None, hf_directory, spec="local")


@pytest.mark.parametrize(("topology", "message"), [(None, "no topology is active"), (Topology(pp=2, vp=2), "vp 2")])
def test_layouts_without_a_teacher_are_refused(monkeypatch, tmp_path, topology, message):
    monkeypatch.setattr(provider, "current_topology", lambda: topology)
    with pytest.raises(ConfigError, match=message):
        teacher_provider(None, tmp_path)


def test_the_optimizer_knows_nothing_of_the_teacher(make, checkpoint):
    """No gradient buffer, no state, no parameter of it; what learns is the student and the projection between the two widths."""
    [model] = convert_to_distillation_model([make.gpt()], teacher_provider(None, checkpoint, spec="local"), make.settings)
    learning = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("_teacher_model.")}
    assert learning.keys() > dict(make.gpt().named_parameters()).keys()
    [wrapped] = wrap([model])
    optimizer, _ = build_optimizer([wrapped], TrainingConfig(max_steps=1, global_batch_size=1, micro_batch_size=1, seq_length=8))
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    assert sum(buffer.numel_unpadded for buffer in buffers) == sum(parameter.numel() for parameter in learning.values())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in learning.values()}
    assert len(held) == len(learning)
    taught = dict(model.teacher_model.named_parameters())
    assert taught
    assert not any(parameter.requires_grad or hasattr(parameter, "main_grad") for parameter in taught.values())


# What is inherited from the layout. Weights are a function of the seed and their global position, so a model built there is the oracle.

TEACHER = ModelConfig(num_layers=3, hidden_size=24, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=2, vocab_size=120)
EXPERTS = TEACHER.with_(num_moe_experts=2)
AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
        "sequence_parallel", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "params_dtype",
        "pipeline_dtype")  # fmt: skip


def differences_from_built(name, sizes, directory):
    """Names of weights and fields of the configuration in which the teacher differs from a model that is built at this layout."""
    with parallel(Topology.from_name(name), model=sizes) as topology:
        teacher = teacher_provider(sizes, directory, spec="te")
        [expected] = build_model(sizes, topology, spec="te", seed=5)
        fields = [axis for axis in AXES if getattr(teacher.config, axis) != getattr(expected.config, axis)]
        found = dict(teacher.named_parameters())
        weights = [name for name, weight in expected.named_parameters() if not torch.equal(weight, found.pop(name))]
        return fields + weights + list(found)


@pytest.fixture(scope="module")
def directories(world, tmp_path_factory):
    """Teachers by name, with their sizes."""
    root = tmp_path_factory.mktemp("teachers")
    [dense], [experts] = (build_model(sizes, world, spec="local", seed=5) for sizes in (TEACHER, EXPERTS))
    save_checkpoint(root / "dense", [dense], topology=world)
    save_checkpoint(root / "experts", [experts], topology=world)
    export_hf([dense], root / "hf")
    return {"dense": (TEACHER, root / "dense"), "hf": (TEACHER, root / "hf"), "experts": (EXPERTS, root / "experts")}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TP2SP", "dense"),
        ("PP2FIRST1", "hf"),
        ("CP2", "dense"),
        ("EP2", "experts"),
        pytest.param("TP2PP2SPLAST1", "dense", marks=pytest.mark.wide),
        pytest.param("TP2PP2SPFIRST1", "hf", marks=pytest.mark.wide),
    ],
)
def test_every_axis_is_inherited(ranks, directories, name, kind):
    size = 4 if "TP2PP2" in name else 2
    assert ranks(size).run(differences_from_built, name, *directories[kind]) == [[]] * size


# Vocabularies that differ by padding.


@pytest.fixture(scope="module")
def padded(world, tmp_path_factory):
    """Teachers by (kind, whether tied, vocabulary), whose padding has been trained, and a tokenizer of fewer tokens."""
    root = tmp_path_factory.mktemp("padded")
    found = {}
    for tied in (True, False):
        for size in (SMALL, LARGE):
            [model] = build_model(TEACHER.with_(vocab_size=size, tie_embeddings=tied), world, spec="local", seed=5)
            for shard in parameter_shards([model]):
                if shard.key in VOCABULARY:
                    shard.tensor[size:] = 1.0
            found["checkpoint", tied, size] = root / f"checkpoint_{tied}_{size}"
            found["hf", tied, size] = root / f"hf_{tied}_{size}"
            save_checkpoint(found["checkpoint", tied, size], [model], topology=world)
            export_hf([model], found["hf", tied, size])
    return found, train_tokenizer(builtin_documents()[:20], TOKENS, root / "tokenizer").path


def batch(size=8):
    ids = torch.arange(size).expand(2, size) * 31
    return {"tokens": ids, "labels": ids + 1, "loss_mask": torch.ones(2, size), "position_ids": ids // 31, "attention_mask": None}


def logits(model):
    """Of the whole padded vocabulary, [B, S, V]."""
    data = batch()
    with torch.no_grad():
        return tensor_parallel.gather_from_tensor_model_parallel_region(model(data["tokens"], data["position_ids"], None))


def align(name, cases, tokenizer):
    """Of each case: the largest difference of the teacher's logits from those of the unaligned one, rows that should be zero and are not,
    and the loss of the distillation beside the one by definition, in double precision, over the shared tokens."""
    results = []
    with parallel(Topology.from_name(name)) as topology:
        for path, vocab_size, shared in cases:
            [student] = build_model(TEACHER.with_(vocab_size=vocab_size, num_layers=1), topology, spec="local", seed=1)
            teacher = teacher_provider(None, path, tokenizer, spec="local", vocab_size=vocab_size)
            assert compared_vocabulary(teacher) == shared
            expected, found = logits(teacher_provider(None, path, spec="local")), logits(teacher)
            nonzero = [
                shard.key
                for shard in parameter_shards([teacher])
                if shard.key in VOCABULARY and shard.tensor[max(0, shared - shard.offset[0]) :].any()
            ]
            log_p, log_q = (values[..., :shared].double().log_softmax(-1) for values in (expected, logits(student)))
            by_definition = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            [model] = convert_to_distillation_model([student], teacher, DistillationConfig())
            data = batch()
            output = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
            total, count = distillation_loss_fn(model, data)(output)[2]["logits_loss"]
            difference = float((expected[..., :shared] - found[..., :shared]).abs().max())
            results.append((difference, nonzero, float(total / count), by_definition))
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("name", [pytest.param("TP1", marks=pytest.mark.wide), "TP2"])
def test_vocabularies_are_aligned(ranks, padded, name):
    """A student with more rows, with fewer, and with more that still fit the teacher's padding."""
    directories, tokenizer = padded
    pairs = ((LARGE, SMALL), (SMALL, LARGE), (300, SMALL))
    cases = [(path, ours, SMALL) for (_, _, size), path in directories.items() for ours, theirs in pairs if size == theirs]
    assert len(cases) == 12
    for results in ranks(Topology.from_name(name).tp).run(align, name, cases, tokenizer):
        for difference, nonzero, loss, by_definition in results:
            assert difference == 0.0
            assert nonzero == []
            assert loss == pytest.approx(by_definition, rel=1e-5)


def misplaced_rows(name, cases, tokenizer):
    """Shards of embedding and head that do not hold the shared rows of the Hugging Face weights, and zeros after them."""
    wrong = []
    with parallel(Topology.from_name(name)):
        for path, hf_path, vocab_size, shared in cases:
            weights = load_file(hf_path / "model.safetensors")
            embedding = weights["model.embed_tokens.weight"]
            wholes = dict(zip(VOCABULARY, (embedding, weights.get("lm_head.weight", embedding)), strict=True))
            teacher = teacher_provider(None, path, tokenizer, spec="local", vocab_size=vocab_size)
            shards = [shard for shard in parameter_shards([teacher]) if shard.key in wholes]
            assert shards
            for shard in shards:
                expected = torch.zeros(shard.global_shape)
                expected[:shared] = wholes[shard.key][:shared]
                if not torch.equal(shard.tensor, expected[shard.index]):
                    wrong.append((path.name, shard.key))
    return wrong


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["PP2FIRST1", pytest.param("TP2PP2FIRST1", marks=pytest.mark.wide)])
def test_rows_are_aligned_on_every_stage(ranks, padded, name):
    """Tied weights lie on the first stage and on the last."""
    directories, tokenizer = padded
    cases = [(path, directories["hf", tied, size], LARGE + SMALL - size, SMALL) for (_, tied, size), path in directories.items()]
    size = 4 if "TP2" in name else 2
    assert ranks(size).run(misplaced_rows, name, cases, tokenizer) == [[]] * size


def test_only_padding_is_aligned(padded, tmp_path):
    directories, tokenizer = padded
    for kind in ("checkpoint", "hf"):
        path = directories[kind, False, SMALL]
        with pytest.raises(ConfigError, match=r"student has 520 rows, of the teacher 270: give their tokenizer"):
            teacher_provider(None, path, vocab_size=LARGE)
        with pytest.raises(ConfigError, match=r"student has 264 rows, of the teacher 270: give their tokenizer"):
            teacher_provider(None, path, vocab_size=264)
        larger = train_tokenizer(builtin_documents()[:20], SMALL + 1, tmp_path / kind)
        with pytest.raises(ConfigError, match=r"student has 520 rows, of the teacher 270, their tokenizer has 271 tokens: 1 of them"):
            teacher_provider(None, path, larger, vocab_size=LARGE)
        with pytest.raises(ConfigError, match=r"student has 259 rows, of the teacher 270, their tokenizer has 260 tokens: 1 of them"):
            teacher_provider(None, path, tokenizer, vocab_size=TOKENS - 1)
        assert compared_vocabulary(teacher_provider(None, path, tokenizer, spec="local", vocab_size=TOKENS)) == TOKENS
        assert compared_vocabulary(teacher_provider(None, path, spec="local", vocab_size=SMALL)) == SMALL


def test_a_teacher_of_other_words_is_refused(padded, tmp_path):
    directories, tokenizer = padded
    stranger = shutil.copytree(directories["hf", False, SMALL], tmp_path / "stranger")
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    words = settings["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (stranger / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="is not the student's"):
        teacher_provider(None, stranger, tokenizer)
    shutil.copy(tokenizer / "tokenizer.json", stranger)
    teacher_provider(None, stranger, tokenizer)


def test_top_k_is_among_the_shared_tokens(make, padded):
    directories, tokenizer = padded
    teacher = teacher_provider(None, directories["checkpoint", False, SMALL], tokenizer, spec="local", vocab_size=LARGE)
    student = make.gpt(make.student.with_(vocab_size=LARGE))
    with pytest.raises(ConfigError, match="logit_kl_topk 271 > vocabulary 270"):
        convert_to_distillation_model([student], teacher, DistillationConfig(logit_kl_topk=SMALL + 1))
    with pytest.raises(ConfigError, match=r"student has 300 tokens, of the teacher 520.*teacher_provider\(\.\.\., vocab_size=\.\.\.\)"):
        convert_to_distillation_model([make.gpt(make.student.with_(vocab_size=300))], teacher, DistillationConfig())
