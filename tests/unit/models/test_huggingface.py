import json

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models import huggingface_writer
from nemo_opt.models.build import build_model
from nemo_opt.models.config import preset
from nemo_opt.models.huggingface import config_from_hf, export_hf, import_hf
from nemo_opt.models.shards import parameter_shards
from nemo_opt.parallel import Topology, parallel

SEQ_LENGTH, BATCH = 64, 2
TOL_REL = 1e-5
"""Of the largest logit. Measured over the cases here: 2e-6 (float32, sums in another order)."""

PLAIN = {"num_key_value_heads": 8}
GROUPED = {"num_key_value_heads": 4, "tie_word_embeddings": True}
# an original context of 32 puts wavelengths of all three kinds (kept, blended, stretched) below 64 positions
SCALED = {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}}  # fmt: skip
MODELS = {"plain": PLAIN, "tied, grouped": GROUPED, "RoPE scaling, wide heads": SCALED}


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory):
    """For each of MODELS a directory as transformers saves it, in several files, with logits.pt: tokens and logits of transformers."""
    return {name: _make_llama(tmp_path_factory.mktemp("llama"), changes) for name, changes in MODELS.items()}


def _make_llama(directory, changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # 300 tokens leave padding rows; weights ten times the usual size make logits of size 7, and errors visible
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, max_position_embeddings=128, **changes)).eval()
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    model.save_pretrained(directory, max_shard_size="200KB")
    tokens_BS = torch.randint(0, 300, (BATCH, SEQ_LENGTH))
    with torch.no_grad():
        torch.save((tokens_BS, model(tokens_BS).logits), directory / "logits.pt")
    return directory


def _weights(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _logits(chunks, tokens_BS):  # noqa: N803
    """Logits [B, S, V] through Megatron's schedule: on the last pipeline stage, None elsewhere."""
    positions_BS = torch.arange(SEQ_LENGTH).expand(1, SEQ_LENGTH)

    def step(microbatches, model):
        output = model(next(microbatches), positions_BS, None)
        return output, lambda output, **_: tensor_parallel.gather_from_tensor_model_parallel_region(output)

    collected = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(tokens_BS.split(1)) for _ in chunks],
        model=chunks,
        num_microbatches=BATCH,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(collected) if collected else None


def _import_compare_export(directory, topology, spec, out_dir):
    """The largest error relative to the largest logit; None on all but the last pipeline stage."""
    tokens_BS, expected_BSV = torch.load(directory / "logits.pt")
    chunks = build_model(config_from_hf(directory), topology, spec=spec, seed=None)
    import_hf(directory, chunks)
    with torch.no_grad():
        logits_BSV = _logits(chunks, tokens_BS)
    export_hf(chunks, out_dir)
    if logits_BSV is None:
        return None
    return ((logits_BSV[..., :300] - expected_BSV).abs().max() / expected_BSV.abs().max()).item()


def _at_layout(name, cases):
    """Of each case (directory, spec, out_dir), at the layout `name`."""
    topology = Topology.from_name(name)
    with parallel(topology):
        return [_import_compare_export(directory, topology, spec, out_dir) for directory, spec, out_dir in cases]


def _round_trip_is_exact(directory, out_dir):
    read, written = _weights(directory), _weights(out_dir)
    return read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(one_rank, hf_dirs, tmp_path, model, spec):
    error = _import_compare_export(hf_dirs[model], one_rank, spec, tmp_path / "out")
    assert error < TOL_REL
    assert _round_trip_is_exact(hf_dirs[model], tmp_path / "out")


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "name"), [(2, "TP2"), (2, "PP2"), (2, "PP2VP2"), pytest.param(4, "TP2PP2", marks=pytest.mark.wide)])
def test_every_layout_computes_the_logits_of_transformers(ranks, hf_dirs, tmp_path, size, name):
    cases = [(hf_dirs["plain"], "te", tmp_path / "plain"), (hf_dirs["tied, grouped"], "local", tmp_path / "tied")]
    _check_layout(ranks(size), name, cases)


@pytest.mark.ranks
@pytest.mark.wide
def test_a_query_group_is_shared_by_several_ranks(ranks, hf_dirs, tmp_path):
    cases = [(hf_dirs["RoPE scaling, wide heads"], spec, tmp_path / spec) for spec in ("te", "local")]  # 2 groups on 4 ranks
    _check_layout(ranks(4), "TP4", cases)


def _check_layout(pool, name, cases):
    *_, errors = pool.run(_at_layout, name, cases)  # the last rank is on the last stage
    for (directory, _, out_dir), error in zip(cases, errors, strict=True):
        assert error < TOL_REL, directory
        assert _round_trip_is_exact(directory, out_dir), directory


@pytest.fixture
def imported(one_rank, hf_dirs):
    """The directory of a tied model, and that model on one rank, with its weights."""
    directory = hf_dirs["tied, grouped"]
    chunks = build_model(config_from_hf(directory), one_rank, spec="local", seed=None)
    import_hf(directory, chunks)
    return directory, chunks


@pytest.fixture
def damaged(imported, tmp_path):
    """A function that writes the model with changed weights into tmp_path/hf, and the built model."""
    directory, chunks = imported

    def write(change):
        weights = _weights(directory)
        change(weights)
        copy = tmp_path / "hf"
        copy.mkdir()
        (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
        save_file(weights, copy / "model.safetensors")
        return copy

    return write, chunks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.3.mlp.up_proj.weight"), "lacks model.layers.3.mlp.up_proj.weight"),
        (lambda w: w.update({"model.layers.4.bias": torch.zeros(2)}), "does not have: model.layers.4.bias"),
        (lambda w: w.update({"model.norm.weight": torch.ones(63)}), r"model.norm.weight has shape \(63,\), the model needs \(64,\)"),
    ],
)
def test_damaged_weights_are_refused_and_the_model_is_untouched(damaged, change, message):
    write, chunks = damaged
    before = [shard.tensor.clone() for shard in parameter_shards(chunks)]
    with pytest.raises(CheckpointError, match=message):
        import_hf(write(change), chunks)
    assert all(torch.equal(shard.tensor, tensor) for shard, tensor in zip(parameter_shards(chunks), before, strict=True))


def test_what_transformers_ignores_is_ignored(damaged):
    write, chunks = damaged
    before = [shard.tensor.clone() for shard in parameter_shards(chunks)]
    extra = {"lm_head.weight": torch.zeros(300, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    import_hf(write(lambda weights: weights.update(extra)), chunks)
    assert all(torch.equal(shard.tensor, tensor) for shard, tensor in zip(parameter_shards(chunks), before, strict=True))


def test_rows_that_pad_the_vocabulary_become_zero(imported):
    directory, chunks = imported
    embedding = chunks[0].embedding.word_embeddings.weight.data.fill_(7.0)
    import_hf(directory, chunks)
    assert embedding[:300].any(dim=1).all()
    assert not embedding[300:].any()


def test_a_model_of_other_sizes_is_refused(imported):
    directory, _ = imported
    (other,) = build_model(config_from_hf(directory).with_(num_layers=2, tie_embeddings=False), Topology(), spec="local", seed=None)
    with pytest.raises(ConfigError, match=r"num_layers: 4 in .*, 2 in the model; tie_embeddings: True in .*, False in the model"):
        import_hf(directory, [other])
    (experts,) = build_model(config_from_hf(directory).with_(num_moe_experts=2), Topology(), spec="local", seed=None)
    with pytest.raises(ConfigError, match="the model has 2 experts"):
        import_hf(directory, [experts])


def test_export_loads_in_transformers(imported, tmp_path):
    from transformers import AutoModelForCausalLM

    directory, chunks = imported
    assert export_hf(chunks, tmp_path / "new" / "out", max_file_bytes=100_000) == tmp_path / "new" / "out"
    assert len(list((tmp_path / "new" / "out").glob("*.safetensors"))) > 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    tokens_BS, logits_BSV = torch.load(directory / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(tokens_BS).logits, logits_BSV)


def test_export_converts_and_says_so(imported, tmp_path):
    _, chunks = imported
    export_hf(chunks, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in _weights(tmp_path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_takes_the_tokenizer_along(imported, tmp_path):
    _, chunks = imported
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (tokenizer / "tokenizer.json").write_text('{"added_tokens": [{"id": 5, "content": "<end>"}]}')
    (tokenizer / "secrets.txt").write_text("no")
    export_hf(chunks, tmp_path / "out", tokenizer_dir=tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5


def test_export_into_a_full_directory_is_refused(imported, tmp_path):
    _, chunks = imported
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_hf(chunks, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_only_a_hugging_face_directory_is_replaced_and_only_on_request(imported, tmp_path):
    _, chunks = imported
    export_hf(chunks, tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("of the first export")
    export_hf(chunks, tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json: it is not overwritten"):
        export_hf(chunks, tmp_path / "out", overwrite=True)


def test_failed_export_leaves_nothing(imported, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    _, chunks = imported
    monkeypatch.setattr(huggingface_writer.SafetensorsWriter, "add", full_disk)
    with pytest.raises(CheckpointError, match=r"export failed: OSError: .*No space left"):
        export_hf(chunks, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantized_models_are_not_exported_without_their_scales(imported, tmp_path):
    class TensorQuantizer(torch.nn.Module):
        pass

    _, chunks = imported
    chunks[0].add_module("quantizer", TensorQuantizer())
    with pytest.raises(ConfigError, match="the model has quantizers, which this export would drop"):
        export_hf(chunks, tmp_path / "out")


def _refused_everywhere(out_dir, changes):
    topology = Topology(pp=2)
    with parallel(topology):
        chunks = build_model(preset("tiny", hidden_size=32, **changes), topology, spec="local")
        try:
            export_hf(chunks, out_dir)
        except (CheckpointError, ConfigError) as error:
            return type(error).__name__, str(error)


@pytest.mark.ranks
def test_every_rank_learns_why_an_export_failed(ranks, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    first, second = ranks(2).run(_refused_everywhere, tmp_path, {})
    assert first == second
    assert first[0] == "CheckpointError"
    first, second = ranks(2).run(_refused_everywhere, tmp_path / "out", {"num_moe_experts": 2})
    assert first == second
    assert first[0] == "ConfigError"
