"""Exports of every algorithm at several layouts: the same files everywhere, read back by two readers; upstream's exporter beside ours."""

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.parallel import Topology, parallel
from nemo_opt.quantize.config import ALGORITHMS
from nemo_opt.quantize.export import export_quantized_hf, plan_export
from nemo_opt.quantize.reader import open_export
from nemo_opt.quantize.tensors import QuantizerSettings
from nemo_opt.testing.quantized import SMALL, labelled_batches, small_quantized

WEIGHTS_EQUAL = ("int8", "int4", "fp8", "nvfp4", "mxfp8", "block_fp8")
"""Files of these do not depend on activations, but for the scales of inputs and cache."""
TP_TOLERANCE = 5e-7
"""Relative, of activations' maxima at TP2: partial sums are added in another order (tests/unit/quantize/test_algorithms.py)."""
LOGITS_TOLERANCE = 1e-6
"""Relative (2-norm) at one rank, where both sides add in the same order: 1.8e-7 seen, from integers' reciprocal scales."""
VARIANTS = [
    *((name, {}) for name in ALGORITHMS),
    ("nvfp4", {"weight_only": True}),
    ("fp8", {"weight_only": True, "enable_kv_cache": False}),
    ("int8", {"weight_only": True}),
    ("nvfp4", {"enable_kv_cache": True, "kv_cache_qformat": "nvfp4"}),
    ("int4_awq", {"enable_kv_cache": False}),
    ("block_fp8", {"enable_kv_cache": False}),
]


@pytest.fixture(scope="module")
def one():
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture(scope="module")
def exported(one, tmp_path_factory):
    """(algorithm, settings) -> (directory, logits of the model in memory), made when first asked for."""
    made = {}

    def get(algorithm, **settings):
        key = algorithm, tuple(sorted(settings.items()))
        if key not in made:
            chunks = small_quantized(algorithm, one, **settings)
            directory = export_quantized_hf(chunks, tmp_path_factory.mktemp("exports") / algorithm)
            made[key] = directory, _logits(chunks[0])
        return made[key]

    return get


def _logits(model):
    (batch,) = labelled_batches(1, seed=11)
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None)


def _error(logits, expected):
    expected = expected[..., : logits.shape[-1]]
    return float((logits - expected).norm() / expected.norm())


def _tensors(directory):
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("algorithm", "settings"), VARIANTS, ids=str)
def test_the_reader_computes_what_the_model_does(exported, algorithm, settings):
    directory, logits = exported(algorithm, **settings)
    model = open_export(directory)
    (batch,) = labelled_batches(1, seed=11)
    assert _error(model.logits(batch["tokens"]), logits) <= LOGITS_TOLERANCE
    assert sum(model.formats.values()) == SMALL.num_layers * 7 + 1
    assert model.formats["unquantised"] == 1  # the head


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("int8", {}),
        ("int8_sq", {}),
        ("int4", {}),
        ("int4", {"enable_kv_cache": False}),
        ("block_fp8", {}),
        ("int8", {"weight_only": True}),
        ("fp8", {"weight_only": True}),
    ],
    ids=str,
)
def test_transformers_reads_exports_in_the_form_of_compressed_tensors(exported, algorithm, settings):
    """Somebody else's code for packing, scales, rounded inputs and rounded caches, beside the reader here."""
    import transformers

    directory, logits = exported(algorithm, **settings)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    (batch,) = labelled_batches(1, seed=11)
    with torch.no_grad():
        assert _error(model(batch["tokens"]).logits, logits) <= LOGITS_TOLERANCE


def _export_at(name, folder, algorithms):
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    for algorithm in algorithms:
        export_quantized_hf(small_quantized(algorithm, topology), f"{folder}/{algorithm}")


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["PP2", pytest.param("TP2", marks=pytest.mark.wide), pytest.param("TP2PP2", marks=pytest.mark.wide)])
def test_files_do_not_depend_on_the_layout(ranks, exported, tmp_path, layout):
    ranks(Topology.from_name(layout).world_size).run(_export_at, layout, str(tmp_path), WEIGHTS_EQUAL)
    for algorithm in WEIGHTS_EQUAL:
        expected, found = (_tensors(directory) for directory in (exported(algorithm)[0], tmp_path / algorithm))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            if "TP2" in layout and name.endswith(("input_scale", "k_scale", "v_scale")):
                torch.testing.assert_close(tensor, expected[name], rtol=TP_TOLERANCE, atol=0)
            else:
                assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), (algorithm, name)
        if layout == "PP2":
            assert all(_bytes(tmp_path / algorithm)[file] == content for file, content in _bytes(exported(algorithm)[0]).items())


def _bytes(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_what_is_not_quantised_takes_the_dtype_that_is_asked_for(one, tmp_path):
    directory = export_quantized_hf(small_quantized("int4_awq", one), tmp_path / "out", dtype=torch.bfloat16)
    tensors = _tensors(directory)
    plain = {
        name: tensor.dtype for name, tensor in tensors.items() if "_proj" not in name and "k_scale" not in name and "v_scale" not in name
    }
    assert set(plain.values()) == {torch.bfloat16}
    assert "model.embed_tokens.weight" in plain
    assert tensors["lm_head.weight"].shape == (SMALL.vocab_size, SMALL.hidden_size)  # without the rows that pad it
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float32
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tied_head_is_not_written(one, tmp_path):
    model = SMALL.with_(tie_embeddings=True)
    chunks = small_quantized("fp8", one, model=model)
    directory = export_quantized_hf(chunks, tmp_path / "out")
    assert "lm_head.weight" not in _tensors(directory)
    (batch,) = labelled_batches(1, seed=11)
    assert _error(open_export(directory).logits(batch["tokens"]), _logits(chunks[0])) <= LOGITS_TOLERANCE


def test_several_files_with_an_index(one, tmp_path):
    directory = export_quantized_hf(small_quantized("int4", one), tmp_path / "out", max_file_bytes=20_000)
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    open_export(directory)


def test_several_formats_in_one_model(one, tmp_path):
    """As auto-quantize leaves them: the first layer's MLP in NVFP4, the rest in FP8; then with INT8 in place of NVFP4."""
    for algorithm, method in (("nvfp4", "modelopt"), ("int8", "compressed-tensors")):
        chunks, others = (small_quantized(name, one, enable_kv_cache=False) for name in ("fp8", algorithm))
        chunks[0].decoder.layers[0].mlp, others[0].decoder.layers[0].mlp = others[0].decoder.layers[0].mlp, chunks[0].decoder.layers[0].mlp
        directory = export_quantized_hf(chunks, tmp_path / algorithm)
        said = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert said["quant_method"] == method
        model = open_export(directory)
        assert sorted(model.formats.values()) == [1, 3, 11]
        (batch,) = labelled_batches(1, seed=11)
        assert _error(model.logits(batch["tokens"]), _logits(chunks[0])) <= LOGITS_TOLERANCE


def test_experts_are_refused(one, tmp_path):
    chunks = small_quantized("fp8", one, model=SMALL.with_(num_moe_experts=2, moe_router_topk=1), enable_kv_cache=False)
    with pytest.raises(ConfigError, match="the model has 2 experts"):
        export_quantized_hf(chunks, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_refused_and_kept(one, tmp_path):
    chunks = small_quantized("int8", one)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not empty: choose another path or pass overwrite=True"):
        export_quantized_hf(chunks, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no config\.json: it is not overwritten"):
        export_quantized_hf(chunks, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def _fail_on_a_full_disk(name, folder):
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    chunks = small_quantized("int4", topology)
    save_file, written = safetensors.torch.save_file, []

    def save_until_full(tensors, path, **options):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    safetensors.torch.save_file = save_until_full
    try:
        export_quantized_hf(chunks, f"{folder}/out", max_file_bytes=20_000)
    except CheckpointError as error:
        return str(error)
    finally:
        safetensors.torch.save_file = save_file
    return "no error"


@pytest.mark.ranks
def test_a_disk_that_fills_up_leaves_nothing_and_every_rank_hears_of_it(ranks, tmp_path):
    messages = ranks(2).run(_fail_on_a_full_disk, "TP2", str(tmp_path))
    assert messages[0] == messages[1]
    assert "export failed: OSError" in messages[0]
    assert "No space left" in messages[0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- refused before any work

FP8 = QuantizerSettings(num_bits=(4, 3), axis=None, block_sizes=None)
INT8_ROWS = QuantizerSettings(num_bits=8, axis=(0,), block_sizes=None)


def _plan(settings, tensors=None):
    return plan_export(SMALL, settings, tensors or {}, dtype=torch.float32)


def test_a_model_without_quantizers_is_refused():
    with pytest.raises(ConfigError, match="no weight of the model is quantised: use export_hf"):
        _plan({})


def test_blocks_over_several_heads_are_refused():
    block = QuantizerSettings(num_bits=(4, 3), axis=(0, 2), block_sizes={-1: 32, -2: 32})
    with pytest.raises(ConfigError, match=r"blocks of 32 rows do not divide the 16 rows of .*k_proj.*a divisor of the head dimension 16"):
        _plan({"decoder.layers.0.self_attention.linear_qkv.weight_quantizer": block})


def test_a_scale_that_no_file_has_a_place_for_is_refused():
    linear = "decoder.layers.0.self_attention.linear_proj"
    inputs = QuantizerSettings(num_bits=8, axis=None, block_sizes=None)
    amax = {f"{linear}.{part}_quantizer._amax": torch.ones(1) for part in ("weight", "input")}
    scale = {f"{linear}.input_quantizer._pre_quant_scale": torch.arange(1.0, 65.0)}
    with pytest.raises(ConfigError, match=r"before .*linear_proj cannot be folded, since query heads .* and int8 has no place for it"):
        _plan({f"{linear}.weight_quantizer": INT8_ROWS, f"{linear}.input_quantizer": inputs}, amax | scale)


def test_inputs_without_an_amax_are_refused(one, tmp_path):
    chunks = small_quantized("fp8", one)
    for module in chunks[0].modules():
        if hasattr(module, "input_quantizer"):
            module.input_quantizer.reset_amax()
    with pytest.raises(ConfigError, match="input_quantizer has no amax: calibrate before exporting"):
        export_quantized_hf(chunks, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------ upstream's exporter


UNPADDED = SMALL.with_(vocab_size=128)
"""Upstream writes the rows that pad the vocabulary as well, which its `config.json` contradicts."""


def _upstream(chunks, folder):
    """What `export_mcore_gpt_to_hf` writes; it wants a Hugging Face directory of the architecture."""
    from modelopt.torch.export import export_mcore_gpt_to_hf

    from nemo_opt.models.huggingface_config import config_to_hf

    source = Path(folder) / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(config_to_hf(UNPADDED, dtype="float32")))
    export_mcore_gpt_to_hf(chunks[0], str(source), dtype=torch.float32, export_dir=f"{folder}/out")
    return Path(folder) / "out"


def test_upstreams_fp8_export_is_read_too(one, tmp_path):
    chunks = small_quantized("fp8", one, enable_kv_cache=False, model=UNPADDED)
    model = open_export(_upstream(chunks, tmp_path))
    (batch,) = labelled_batches(1, seed=11)
    assert _error(model.logits(batch["tokens"]), _logits(chunks[0])) <= LOGITS_TOLERANCE


def test_upstreams_fp8_scales_are_ignored_by_transformers(one, tmp_path):
    """Fault 4: it loads without an error, and computes with the codes."""
    import transformers

    chunks = small_quantized("fp8", one, enable_kv_cache=False, model=UNPADDED)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(_upstream(chunks, tmp_path), dtype=torch.float32).eval()
    (batch,) = labelled_batches(1, seed=11)
    with torch.no_grad():
        assert _error(model(batch["tokens"]).logits, _logits(chunks[0])) > 0.1


def test_upstream_drops_awqs_scales_and_says_nothing_of_int4(one, tmp_path):
    """Fault 3. Ours of the same model is in `test_the_reader_computes_what_the_model_does`."""
    chunks = small_quantized("int4_awq", one, enable_kv_cache=False, model=UNPADDED)
    scales = [m.input_quantizer.pre_quant_scale for m in chunks[0].modules() if hasattr(m, "input_quantizer")]
    assert any(scale is not None and scale.min() < 0.9 for scale in scales)
    directory = _upstream(chunks, tmp_path)
    assert not [name for name in _tensors(directory) if "pre_quant" in name]
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert not (directory / "hf_quant_config.json").exists()


@pytest.mark.parametrize(("algorithm", "error"), [("int8", RuntimeError), ("int8_sq", ValueError), ("w4a8_awq", ValueError)])
def test_upstream_cannot_export_these(one, tmp_path, algorithm, error):
    """Fault 5."""
    with pytest.raises(error, match=r"invalid for input of size|not yet supported"):
        _upstream(small_quantized(algorithm, one, enable_kv_cache=False, model=UNPADDED), tmp_path)


def test_upstream_writes_padding_and_other_cache_scales(one, exported, tmp_path):
    theirs, ours = _tensors(_upstream(small_quantized("fp8", one), tmp_path)), _tensors(exported("fp8")[0])
    assert len(theirs["model.embed_tokens.weight"]) == 128 != SMALL.vocab_size == len(ours["model.embed_tokens.weight"])
    assert theirs["model.layers.0.self_attn.k_scale"].item() == 1.0
    assert ours["model.layers.0.self_attn.k_proj.k_scale"].item() < 0.1


def _upstream_at(name, folder):
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    chunks = small_quantized("fp8", topology, enable_kv_cache=False, model=UNPADDED)
    _upstream(chunks, folder)


@pytest.mark.ranks
def test_upstream_writes_one_ranks_part_at_tp2(ranks, tmp_path):
    """Fault 2. Ours at TP2 is in `test_files_do_not_depend_on_the_layout`."""
    ranks(2).run(_upstream_at, "TP2", str(tmp_path))
    rows = {len(tensor) for name, tensor in _tensors(tmp_path / "out").items() if name.endswith("up_proj.weight")}
    assert SMALL.ffn_hidden_size not in rows
