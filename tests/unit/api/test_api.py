"""Every function of the API on two ranks, in the order a user calls them: numbers, files, reload at other layouts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import nemo_opt.api as api
from nemo_opt.checkpoint.info import read_info
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.training.config import TrainingConfig

pytestmark = [pytest.mark.ranks, pytest.mark.wide]

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=384, max_position_embeddings=64
)
TP2, PP2, DP2 = Topology(tp=2), Topology(pp=2), Topology()
EVAL_BATCHES = 2
CALIBRATION = QuantizationConfig(
    calibration_dataset="builtin", calibration_dataset_size=8, calibration_batch_size=2, calibration_seq_len=32
)


def settings(root, *, mbs=2):
    return api.data_config(seq_length=32, micro_batch_size=mbs, global_batch_size=4, index_mapping_dir=f"{root}/index")


def training(steps=6, **changes):
    values = {"max_steps": steps, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-2, "limit_val_batches": 2}
    return TrainingConfig(**(values | changes))


def everything(root):
    """On each rank; returns results by name."""
    data, r = settings(root), {}
    path = {
        name: f"{root}/{name}"
        for name in (
            "teacher",
            "resumed",
            "fp8",
            "sweep",
            "measured",
            "mixed",
            "quantised hf",
            "pruned",
            "from scores",
            "searched",
            "dropped",
            "distilled",
            "hf",
            "again",
        )
    }
    r["teacher"] = api.train(
        output=path["teacher"], model=MODEL, tokenizer=f"{root}/tokenizer", data=data, training=training(), topology=DP2, log_dir=root
    )
    r["resumed"] = api.train(
        output=path["resumed"],
        checkpoint=path["teacher"],
        resume=True,
        data=data,
        training=training(8),
        topology=DP2,
        save_interval=1,
        save_optimizer=False,
    )
    r["eval"] = api.evaluate(path=path["teacher"], data=data, topology=TP2, eval_batches=EVAL_BATCHES)
    r["fp8"] = api.ptq(
        checkpoint=path["teacher"],
        quantization=CALIBRATION,
        export=ExportConfig(path=path["fp8"], export_format="nemo"),
        data=data,
        topology=TP2,
        eval_batches=EVAL_BATCHES,
        report=f"{root}/fp8.html",
    )
    r["sweep"] = api.ptq_sweep(
        checkpoint=path["teacher"],
        output=path["sweep"],
        algorithms=["fp8", "int4", "mxfp8"],
        quantization=CALIBRATION,
        data=data,
        topology=TP2,
        eval_batches=EVAL_BATCHES,
        report=f"{root}/sweep.html",
    )
    r["measured"] = api.ptq_sweep(
        checkpoint=path["teacher"],
        output=path["measured"],
        algorithms=["fp8"],
        quantization=CALIBRATION,
        export_format=None,
        data=data,
        topology=PP2,
        eval_batches=EVAL_BATCHES,
    )
    r["recipe"] = api.search_recipe(
        checkpoint=path["teacher"],
        output=f"{root}/mixed.yaml",
        effective_bits=6.0,
        candidates=[QuantizationConfig(algorithm=name, awq_block_size=16) for name in ("int4", "int8")],
        topology=TP2,
        data=data,
        samples=8,
    )
    r["mixed"] = api.ptq(
        checkpoint=path["teacher"],
        quantization=replace(CALIBRATION, algorithm=f"{root}/mixed.yaml"),
        export=ExportConfig(path=path["mixed"], export_format="nemo", generate_sample=True),
        data=data,
        topology=PP2,
        eval_batches=EVAL_BATCHES,
    )
    r["quantised hf"] = api.export_ckpt(checkpoint=path["fp8"], output=path["quantised hf"], topology=PP2)
    r["quantised hf eval"] = api.evaluate(path=path["quantised hf"], data=data, topology=DP2, eval_batches=EVAL_BATCHES // 2)
    r["fp8 again"] = api.evaluate(path=path["fp8"], data=data, topology=PP2, eval_batches=EVAL_BATCHES)
    r["pruned"] = api.prune(
        checkpoint=path["teacher"],
        output=path["pruned"],
        pruning=PruningConfig(target_ffn_hidden_size=32, target_hidden_size=16),
        data=data,
        topology=PP2,
        num_train_samples=4,
        eval_batches=EVAL_BATCHES,
        save_scores=f"{root}/scores",
    )
    r["from scores"] = api.prune(
        checkpoint=path["teacher"],
        output=path["from scores"],
        pruning=PruningConfig(target_ffn_hidden_size=32, target_hidden_size=16),
        topology=TP2,
        scores=f"{root}/scores",
        eval_batches=0,
        report=f"{root}/report.html",
    )
    r["from scores eval"] = api.evaluate(path=path["from scores"], data=data, topology=PP2, eval_batches=EVAL_BATCHES)
    r["searched"] = api.prune(
        checkpoint=path["teacher"],
        output=path["searched"],
        pruning=PruningConfig(target_params=0.8 * r["teacher"].parameters, search={"top_k": 2}),
        data=data,
        topology=TP2,
        scores=f"{root}/scores",
        eval_batches=EVAL_BATCHES,
        num_train_samples=4,
        report=f"{root}/search.html",
    )
    r["dropped"] = api.prune(
        checkpoint=path["teacher"], output=path["dropped"], pruning=PruningConfig(drop_layers=(1,)), topology=TP2, eval_batches=0
    )
    r["distilled"] = api.distill(
        student=path["pruned"],
        teacher=path["teacher"],
        output=path["distilled"],
        distillation=DistillationConfig(intermediate_layer_pairs=[("decoder.final_layernorm", "decoder.final_layernorm")]),
        data=data,
        training=training(6, val_check_interval=3),
        topology=PP2,
        eval_batches=EVAL_BATCHES,
    )
    r["hf"] = api.export_ckpt(checkpoint=path["distilled"], output=path["hf"], topology=TP2)
    r["hf"] = api.export_ckpt(checkpoint=path["distilled"], output=path["hf"], topology=PP2, overwrite=True)
    r["opened"] = api.evaluate(path=path["hf"], data=data, topology=DP2, eval_batches=EVAL_BATCHES // 2)
    r["again"] = api.import_ckpt(source=path["hf"], output=path["again"], topology=TP2)
    r["again eval"] = api.evaluate(path=path["again"], data=data, topology=PP2, eval_batches=EVAL_BATCHES)
    return r


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("api")
    train_tokenizer(api.builtin_corpus().read_text().splitlines()[:40], MODEL.vocab_size, path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def results(ranks, root):
    first, second = ranks(2).run(everything, str(root), timeout_s=240)
    for name, result in first.items():
        assert _numbers(result) == pytest.approx(_numbers(second[name])), f"{name}: ranks disagree"
    return first


def _numbers(result):
    return {k: v for k, v in result.to_dict().items() if isinstance(v, float) and "time" not in k and "per_s" not in k}


def test_training(results):
    teacher = results["teacher"]
    assert teacher.layout == "TP1PP1DP2"
    assert teacher.loss_last < teacher.loss_first
    assert teacher.loss_uniform == pytest.approx(math.log(384))
    assert teacher.tokens_per_s > 0
    info = read_info(teacher)
    assert (info.model, info.iteration, info.consumed_samples, info.has_optimizer) == (MODEL, 6, 24, True)


def test_resume(results, root):
    assert read_info(results["resumed"]).iteration == 8
    assert not read_info(results["resumed"]).has_optimizer
    assert results["resumed"].loss_after < results["teacher"].loss_after
    assert (root / "metrics.jsonl").read_text().count("grad_norm") == 6
    assert (results["teacher"].resumable, results["resumed"].resumable) == (results["teacher"].path, None)
    assert not (root / "resumed-resume").exists()


def test_parameters_are_those_of_the_sizes(results):
    layer = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert results["eval"].parameters == 2 * 384 * 32 + 2 * layer + 32
    assert len({results[name].parameters for name in ("teacher", "eval", "fp8", "fp8 again")}) == 1, "whatever the layout"


def test_ptq(results):
    fp8 = results["fp8"]
    assert fp8.loss_before == pytest.approx(results["eval"].loss, abs=1e-6)
    assert 0 < abs(fp8.loss_after - fp8.loss_before) < 0.05
    assert fp8.quantizers == 2 * (4 * 2 + 2), "inputs and weights of four linears, keys and values, in two layers"
    # An activation that differs in its last bit may round to the neighbouring FP8 value.
    assert results["fp8 again"].loss == pytest.approx(fp8.loss_after, abs=1e-4)
    assert (fp8.bytes_before > 0, read_info(fp8).has_modelopt_state) == (True, True)


def test_ptq_measures_what_is_lost(results, root):
    fp8 = results["fp8"]
    assert fp8.calibration["tokens"] == 8 * 32
    assert len(fp8.quantizer_facts) == fp8.quantizers
    assert 28 < fp8.sqnr["weights"]["worst"] <= fp8.sqnr["weights"]["median"] < 36, "three bits of mantissa: about 31.5 dB"
    assert 28 < fp8.sqnr["activations"]["worst"] <= fp8.sqnr["activations"]["median"] < 36
    assert fp8.quantizer_facts[fp8.sqnr["weights"]["worst_name"]]["sqnr_db"] == fp8.sqnr["weights"]["worst"]
    assert 8 < fp8.bits_per_weight < 8.1
    assert fp8.bits_per_weight < fp8.bits_per_parameter < 16
    assert (root / "fp8.html").read_text().count("<svg") == 2


def test_sweep(results, root):
    sweep, fp8 = results["sweep"], results["fp8"]
    assert list(sweep.runs) == ["fp8", "int4", "mxfp8"]
    assert sweep.failed == ["mxfp8"]
    assert "blocks of 32 do not divide the 16 inputs of linear_proj at tp 2" in sweep.runs["mxfp8"].error
    assert sweep.loss_before == fp8.loss_before
    for run in (sweep.runs["fp8"].result, results["measured"].runs["fp8"].result):
        assert run.loss_after == pytest.approx(fp8.loss_after, abs=1e-4)  # as above, at another layout
        assert run.sqnr["weights"] == pytest.approx(fp8.sqnr["weights"], abs=1e-6)
        assert run.bits_per_weight == fp8.bits_per_weight
    int4 = sweep.runs["int4"].result
    assert (int4.block, int4.bits_per_weight) == ("16", 5.0), "a block of 128 was reduced to what fits"
    assert "quantization_config" in json.loads((root / "sweep" / "int4" / "config.json").read_text())
    for proof in (int4.proof, fp8.proof):
        assert proof["logit_error"] <= proof["logit_bound"]
    assert int4.path == str(root / "sweep" / "int4")
    assert int4.time_s < sweep.time_s
    measured = results["measured"].runs["fp8"].result
    assert (measured.bytes_after, measured.export_format, measured.path) == (None, "none", results["teacher"].path)
    assert [file.name for file in (root / "measured").iterdir()] == ["sweep.json"]
    written = json.loads((root / "sweep" / "sweep.json").read_text())
    assert written["runs"]["int4"]["result"]["loss_after"] == int4.loss_after
    text = (root / "sweep.html").read_text()
    assert text.count("<svg") == 2 + 2 * 2
    assert "failed: blocks of 32" in text


def test_recipe_is_searched_and_quantises_at_another_layout(results):
    recipe, mixed = results["recipe"], results["mixed"]
    assert (recipe.layout, recipe.budget_bits) == ("TP2PP1", 6.0)
    assert 4 <= recipe.effective_bits <= 6
    assert sum(recipe.formats.values()) == len(recipe.format_of) == 2 * 4
    assert recipe.parameters == results["teacher"].parameters
    assert recipe.time_s > 0
    inputs = sum(name == "int8" for name in recipe.format_of.values())
    assert mixed.quantizers == inputs + sum(name != "none" for name in recipe.format_of.values())
    assert list(mixed.samples) == ["Born in north-east France, Soyer trained as a", "I was born in"]
    assert mixed.proof["logit_error"] == 0


def test_quantised_checkpoint_becomes_a_directory_that_computes_the_same(results):
    assert results["quantised hf"].bytes_after < 4 * results["teacher"].parameters, "less than float32, tokenizer included"
    found = results["quantised hf eval"]
    assert found.formats == {"FP8": 2 * 7, "unquantised": 1}
    # Files leave out the rows that pad the vocabulary, which Megatron's loss counts.
    assert found.loss == pytest.approx(results["fp8"].loss_after, abs=0.05)


def test_prune(results):
    pruned = results["pruned"]
    assert read_info(pruned).model == MODEL.with_(hidden_size=16, ffn_hidden_size=32, kv_channels=8)
    assert (pruned.model_before["hidden_size"], pruned.model_after["hidden_size"]) == (32, 16)
    assert pruned.parameters < pruned.parameters_before == results["teacher"].parameters
    assert pruned.loss_after > pruned.loss_before
    assert pruned.importance_tokens == 4 * 32
    assert pruned.kept_layers == list(range(1, MODEL.num_layers + 1))
    assert pruned.search is None


def test_pruning_from_scores_gives_the_same_model(results, root):
    pruned = results["from scores"]
    assert (pruned.layout, pruned.loss_before, pruned.importance_tokens) == ("TP2PP1", None, 4 * 32)
    assert read_info(pruned).model == read_info(results["pruned"]).model
    assert results["from scores eval"].loss == pytest.approx(results["pruned"].loss_after, abs=1e-5)
    text = (root / "report.html").read_text()
    assert "Hidden channels" in text
    assert "Search" not in text


def test_search(results, root):
    searched = results["searched"]
    limit = 0.8 * searched.parameters_before
    assert searched.search["limits"] == {"params": limit}
    scored = searched.search["scored"]
    assert 1 <= len(scored) <= 2 <= searched.search["fitting"]
    assert searched.parameters == searched.search["best"]["metrics"]["params"] <= limit
    assert searched.search["best"]["score"] == max(candidate["score"] for candidate in scored)
    assert searched.loss_after == pytest.approx(-searched.search["best"]["score"], abs=1e-5), "what was scored is what was written"
    assert {name: searched.model_after[name] for name in searched.search["best"]["sizes"]} == searched.search["best"]["sizes"]
    assert "architectures are within" in (root / "search.html").read_text()
    assert results["dropped"].model_after["num_layers"] == 1
    assert results["dropped"].loss_after is None


def test_distill(results):
    distilled = results["distilled"]
    assert distilled.steps == 6
    assert distilled.teacher_loss == pytest.approx(results["eval"].loss, abs=1e-5)
    assert distilled.loss_before == pytest.approx(results["pruned"].loss_after, abs=1e-5)
    assert distilled.kd_loss_last < distilled.kd_loss_first
    assert distilled.loss_after < distilled.loss_before
    assert distilled.parameters == results["pruned"].parameters, "the teacher is not in the checkpoint"
    assert list(distilled.validation_losses) == ["3", "6"]
    assert distilled.validation_losses["6"] == pytest.approx(distilled.loss_after, abs=1e-6)
    assert 0 < distilled.logits_loss_last < distilled.logits_loss_first < distilled.kd_loss_first
    assert 0 < distilled.intermediate_loss_last < distilled.intermediate_loss_first


def test_export_and_import(results):
    expected = results["distilled"].loss_after
    assert results["opened"].spec == "transformers"
    assert results["opened"].loss == pytest.approx(expected, abs=1e-5)
    assert results["again eval"].loss == pytest.approx(expected, abs=1e-5)
    assert not list(Path(results["again"]).rglob("*.safetensors")), "the checkpoint holds no second copy of the weights"
    assert (Path(results["again"]) / "tokenizer" / "tokenizer.json").is_file()
    assert results["hf"].bytes_after > 0
