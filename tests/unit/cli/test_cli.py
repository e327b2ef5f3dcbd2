"""The command line, with the launch replaced by a recorder, and how results look."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from nemo_opt import launch
from nemo_opt.api import checks
from nemo_opt.api.results import (
    DistillResult,
    EvalResult,
    ExportResult,
    ImportResult,
    PruneResult,
    PtqResult,
    RecipeResult,
    SweepResult,
    SweepRun,
    TrainResult,
)
from nemo_opt.cli import report, run
from nemo_opt.cli.main import main
from nemo_opt.errors import ConfigError
from nemo_opt.forked import ForkServerError
from nemo_opt.launch import RankFailedError
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.space import SearchSpace
from nemo_opt.quantize.config import ALGORITHMS

FACTS = {"path": "OUT", "layout": "TP2PP1", "spec": "te", "device": "cpu/gloo", "parameters": 1_115_264, "time_s": 2.5}
RESULTS = {
    "train": TrainResult(**FACTS, steps=10, loss_first=7.6, loss_last=6.5, loss_after=6.6, loss_uniform=7.62, tokens_per_s=2500.0),
    "ptq": PtqResult(
        **FACTS,
        algorithm="fp8",
        export_format="nemo",
        loss_before=5.0,
        loss_after=5.01,
        quantizers=32,
        bytes_before=4_680_000,
        bytes_after=999,
    ),
    "prune": PruneResult(
        **FACTS,
        loss_before=5.0,
        loss_after=None,
        parameters_before=2_000_000_000,
        model_before={"hidden_size": 128, "num_layers": 4},
        model_after={"hidden_size": 64, "num_layers": 4},
    ),
    "distill": DistillResult(
        **FACTS,
        steps=5,
        teacher="T",
        teacher_loss=5.0,
        loss_before=5.5,
        loss_after=5.2,
        kd_loss_first=0.5,
        kd_loss_last=0.2,
        tokens_per_s=1.0,
    ),
    "import_ckpt": ImportResult(**FACTS, source="HF", bytes_after=4_680_000_000),
    "export_ckpt": ExportResult(**FACTS, source="CKPT", bytes_after=4_680),
    "evaluate": EvalResult(**FACTS, loss=5.0, tokens=8192),
    "search_recipe": RecipeResult(**FACTS, effective_bits=5.4, budget_bits=6, formats={"int4": 1}, format_of={"a": "int4"}),
}


MEASURED = replace(
    RESULTS["ptq"],
    block="64",
    bits_per_weight=4.25,
    bits_per_parameter=9.79,
    calibration={"samples": 64, "tokens": 8192, "tokens_per_s": 16384.0},
    sqnr={kind: {"median": 31.62, "worst": worst, "worst_name": "W"} for kind, worst in (("weights", 30.04), ("activations", None))},
    proof={"logit_error": 1.25e-6, "logit_bound": 1e-5},
)
SWEEP = {"checkpoint": "CKPT", "loss_before": 5.0, "bytes_before": 4_680_000}
RESULTS["ptq_sweep"] = SweepResult(**FACTS, **SWEEP, runs={"fp8": SweepRun(result=RESULTS["ptq"]), "int4": SweepRun(result=MEASURED)})


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What a command would start, as (command, devices, settings); the result is that of `RESULTS`."""
    calls = []

    def run_ranks(target, settings, *, devices):
        command = target.removeprefix("nemo_opt.api:")
        calls.append((command, devices, settings))
        return RESULTS[command]

    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    for name in checks.__all__:
        if name.startswith("check_"):
            monkeypatch.setattr(checks, name, lambda **settings: None)
    return calls


def call(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    return end.value.code or 0


@pytest.mark.parametrize(
    ("arguments", "command", "devices", "topology", "settings"),
    [
        ("train OUT --preset tiny --tokenizer TOK --tp 2", "train", 2, Topology(tp=2), {"tokenizer": "TOK", "checkpoint": None}),
        ("train OUT --checkpoint C --resume --log-dir L", "train", 1, Topology(), {"checkpoint": "C", "resume": True, "log_dir": "L"}),
        ("train OUT --checkpoint C --save-interval 5", "train", 1, Topology(), {"resume": False, "save_interval": 5}),
        ("import HF OUT --tp 2 --pp 2", "import_ckpt", 4, Topology(tp=2, pp=2), {"source": "HF", "output": "OUT"}),
        ("export CKPT HF --pp 2", "export_ckpt", 2, Topology(pp=2), {"checkpoint": "CKPT", "output": "HF", "overwrite": False}),
        ("ptq CKPT OUT -a int8 --devices 4 --tp 2", "ptq", 4, Topology(tp=2), {"checkpoint": "CKPT", "spec": None, "report": None}),
        ("ptq CKPT OUT --sweep --pp 2", "ptq_sweep", 2, Topology(pp=2), {"output": "OUT", "algorithms": [*ALGORITHMS]}),
        ("prune CKPT OUT --hidden-size 64 --pp 2 --overwrite", "prune", 2, Topology(pp=2), {"num_train_samples": 128, "overwrite": True}),
        ("prune CKPT OUT --drop-layer 1 --drop-layer 3", "prune", 1, Topology(), {"output": "OUT"}),
        ("distill S T OUT --kd-config kd.yaml --cp 2", "distill", 2, Topology(cp=2), {"student": "S", "distillation": "kd.yaml"}),
        ("eval DIR --spec local --eval-batches 3", "evaluate", 1, Topology(), {"path": "DIR", "spec": "local", "eval_batches": 3}),
    ],
)  # fmt: skip
def test_commands(started, capsys, arguments, command, devices, topology, settings):
    assert call(arguments) == 0
    [(called, ranks, given)] = started
    assert (called, ranks, given["topology"]) == (command, devices, topology)
    assert {name: given[name] for name in settings} == settings
    output = capsys.readouterr().out
    assert "OUT" in output
    assert "TP2PP1, te layer spec, cpu/gloo" in output


def test_settings_of_the_commands(started):
    call("ptq CKPT OUT -a int8 --calibration-samples 16 --data a.txt --mbs 2")
    call("prune CKPT OUT --drop-layer 1 --drop-layer 3 --mock")
    call("distill S T OUT --steps 50 --lr 0.01")
    ptq, prune, distill = (settings for _, _, settings in started)
    assert (ptq["quantization"].algorithm, ptq["quantization"].calibration_dataset_size) == ("int8", 16)
    assert ptq["data"].paths == ["a.txt"]
    assert prune["pruning"].drop_layers == (1, 3)
    assert prune["data"].mock
    training = distill["training"]
    assert (training.max_steps, training.warmup_steps, training.min_lr) == (50, 5, 0.001)


def test_quantisation_by_settings(started):
    call("ptq CKPT OUT -a int4_awq --awq-block-size 64 --weight-only --no-kv-cache --export-format hf --report R.html --packing pad")
    call("ptq CKPT OUT --sweep --algorithms fp8,int4 --no-export --kv-cache --report R.html")
    one, sweep = (settings for _, _, settings in started)
    quantization = one["quantization"]
    assert (quantization.algorithm, quantization.awq_block_size, quantization.weight_only) == ("int4_awq", 64, True)
    assert (quantization.enable_kv_cache, one["export"].export_format, str(one["export"].path), one["report"]) == (
        False,
        "hf",
        "OUT",
        "R.html",
    )
    assert (sweep["algorithms"], sweep["export_format"], sweep["report"]) == (["fp8", "int4"], None, "R.html")
    assert sweep["quantization"].enable_kv_cache
    call("ptq CKPT OUT --sweep")
    assert started[-1][2]["export_format"] == "hf"
    call("ptq CKPT OUT --sweep --export-format nemo")
    assert started[-1][2]["export_format"] == "nemo"
    call("ptq CKPT OUT")
    assert started[-1][2]["export"].export_format == "nemo"
    assert not started[-1][2]["export"].generate_sample
    assert quantization.calibration_packing == "pad"
    call("ptq CKPT OUT --sq-alpha 0.25 --fp8-block-shape 16 64 --kv-cache-format nvfp4 --generate-sample")
    settings = started[-1][2]
    quantization = settings["quantization"]
    assert (quantization.sq_alpha, quantization.fp8_block_shape) == (0.25, (16, 64))
    assert (quantization.kv_cache_qformat, quantization.calibration_packing) == ("nvfp4", "pack")
    assert settings["export"].generate_sample


def test_distillation_by_settings(started):
    call("distill S T OUT --steps 50 --eval-batches 4 --resume --save-interval 10 --save-optimizer --report R.html")
    call("distill S T OUT --steps 50 --val-check-interval 7")
    call("distill S T OUT --steps 5 --report R.html")
    call("distill S T OUT --report R.html --eval-batches 0")
    call("distill S T OUT")
    first, *others = (settings for _, _, settings in started)
    assert {name: first[name] for name in ("eval_batches", "resume", "save_interval", "save_optimizer", "report")} == {
        "eval_batches": 4, "resume": True, "save_interval": 10, "save_optimizer": True, "report": "R.html",
    }  # fmt: skip
    assert (first["training"].val_check_interval, first["training"].limit_val_batches) == (5, 4), "a page shows the way"
    assert [settings["training"].val_check_interval for settings in others] == [7, 1, 100, 100]
    last = others[-1]
    assert (last["eval_batches"], last["resume"], last["save_interval"], last["save_optimizer"], last["report"]) == (
        8,
        False,
        0,
        False,
        None,
    )


def test_unknown_packing_is_refused(started, capsys):
    assert call("ptq CKPT OUT --packing tight") == 2
    assert "give pack or pad" in capsys.readouterr().err
    assert not started


def test_recipe(started):
    call("recipe CKPT mixed.yaml --bits 6 --algorithms int4,int8 --awq-block-size 32 --samples 16 --tp 2")
    ((command, devices, settings),) = started
    assert (command, devices, settings["topology"]) == ("search_recipe", 2, Topology(tp=2))
    assert (settings["output"], settings["effective_bits"], settings["samples"]) == ("mixed.yaml", 6.0, 16)
    assert [(config.algorithm, config.awq_block_size) for config in settings["candidates"]] == [("int4", 32), ("int8", 32)]


@pytest.mark.parametrize("flag", ["--algorithms fp8", "--no-export"])
def test_settings_of_a_sweep_need_one(started, capsys, flag):
    assert call(f"ptq CKPT OUT {flag}") == 2
    assert "add --sweep" in capsys.readouterr().err
    assert not started


def test_a_sweep_with_a_failure_is_one(started, monkeypatch, capsys, tmp_path):
    runs = RESULTS["ptq_sweep"].runs | {"nvfp4": SweepRun(error="KeyError: [a] it is not there")}
    monkeypatch.setitem(RESULTS, "ptq_sweep", replace(RESULTS["ptq_sweep"], runs=runs))
    path = tmp_path / "sweep.json"
    assert call(f"ptq CKPT OUT --sweep --json {path}") == 1
    assert "nvfp4 failed: KeyError: [a] it is not there" in capsys.readouterr().out
    written = json.loads(path.read_text())["runs"]
    assert (written["nvfp4"]["result"], written["fp8"]["result"]["loss_after"]) == (None, 5.01)


def test_a_quantisation_says_what_was_measured(capsys):
    report.show(MEASURED)
    output = capsys.readouterr().out
    for text in (
        "32 quantizers, blocks of 64",
        "4.250 a quantised weight, 9.79 a parameter",
        "64 samples, 8,192 tokens, 16.4 k tokens/s",
        "median 31.6 dB, worst 30.0 dB: W",
        "worst exact: W",
        "logit error 1.25e-06 (bound 1e-05)",
    ):
        assert text in output
    report.show(replace(RESULTS["ptq"], bytes_after=None))
    assert "bytes" not in capsys.readouterr().out


def test_a_sweep_is_a_table(capsys):
    report.show(RESULTS["ptq_sweep"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "unquantised 5.0000 16 4.68 MB" in lines
    assert "fp8 5.0100 +0.01000 - 999 B - / - - / - - 2.5 s" in lines
    assert "int4 64 5.0100 +0.01000 4.250 999 B 31.6 / 30.0 31.6 / - yes 2.5 s" in lines
    unmeasured = replace(MEASURED, loss_before=None, loss_after=None, bytes_after=None)
    report.show(replace(RESULTS["ptq_sweep"], loss_before=None, runs={"int4": SweepRun(result=unmeasured)}))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "int4 64 - - 4.250 - 31.6 / 30.0 31.6 / - yes 2.5 s" in lines


def test_pruning_by_limits_and_scores(started):
    call("prune CKPT OUT --target-params 6e5 --target-memory-mb 2.5 --max-width-pruning 0.5 --max-depth-pruning 0.3 --top-k 4 --tp 2")
    call("prune CKPT OUT --target-active-params 5 --scores S --report R.html")
    call("prune CKPT OUT --query-groups 2 --experts 4 --attention-heads 4 --num-layers 2 --ffn-hidden-size 8 --save-scores S")
    limits, scored, sizes = (settings for _, _, settings in started)
    assert limits["pruning"] == PruningConfig(
        target_params=6e5, target_memory_mb=2.5, search=SearchSpace(max_width_pruning=0.5, max_depth_pruning=0.3, top_k=4)
    )
    assert (limits["scores"], limits["save_scores"], limits["report"]) == (None, None, None)
    assert scored["pruning"] == PruningConfig(target_active_params=5)
    assert (scored["scores"], scored["save_scores"], scored["report"]) == ("S", None, "R.html")
    assert sizes["pruning"].targets == {
        "ffn_hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 2, "num_moe_experts": 4
    }  # fmt: skip
    assert sizes["save_scores"] == "S"


def test_a_search_is_reported(capsys):
    report.show(replace(RESULTS["prune"], search={"scored": [1, 2, 3], "fitting": 40}))
    assert "best of 3 scored, 40 within the limits" in capsys.readouterr().out


def test_a_pruning_says_which_layers_are_gone_and_what_importance_saw(capsys):
    sizes = {"num_layers": 4, "kv_channels": None}
    pruned = replace(RESULTS["prune"], model_before=sizes, model_after={"num_layers": 2, "kv_channels": 16}, kept_layers=[1, 3])
    report.show(replace(pruned, importance_tokens=4096))
    measured = capsys.readouterr().out
    assert [line for line in measured.splitlines() if "dropped" in line and "2, 4" in line]
    assert "measured on 4,096 tokens" in measured
    assert "kv_channels" not in measured, "channels of a head never change"
    report.show(pruned)
    assert "importance" not in capsys.readouterr().out


def test_distillation_is_shown_by_its_parts(capsys):
    measured = replace(
        RESULTS["distill"], logits_loss_first=0.4, logits_loss_last=0.15, intermediate_loss_first=0.0, intermediate_loss_last=0.0,
        resumed_at=2, peak_memory_bytes=1_234_000_000, resumable="OUT",
    )  # fmt: skip
    report.show(measured)
    shown = capsys.readouterr().out
    for text in ("of logits", "0.4000 -> 0.1500", "5 (2 of them before), 1 tokens/s", "1.23 GB at most on a rank", "can be resumed"):
        assert text in shown
    assert "hidden states" not in shown
    report.show(replace(measured, intermediate_loss_first=0.25, intermediate_loss_last=0.0, lm_loss_first=6.0, lm_loss_last=5.5))
    shown = capsys.readouterr().out
    assert "0.2500 -> 0.0000" in shown
    assert "6.0000 -> 5.5000" in shown
    report.show(RESULTS["distill"])
    shown = capsys.readouterr().out
    assert not [text for text in ("of logits", "before", "memory", "resumed") if text in shown]


def test_json(started, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert call(f"eval DIR --json {path}") == 0
    assert json.loads(path.read_text()) == {"kind": "EvalResult", **RESULTS["evaluate"].to_dict()}
    assert call(f"eval DIR --json {tmp_path}/missing/result.json") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("tp 3 is wrong"), 2, "error: tp 3 is wrong"),
        (RankFailedError("rank 1 failed:\nTraceback"), 1, "failed: rank 1 failed:\nTraceback"),
        (KeyboardInterrupt(), 130, ""),  # typer says that it was aborted
    ],
)
def test_exit_codes(started, monkeypatch, capsys, error, code, text):
    def run_ranks(*_, **__):
        raise error

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    assert call("eval DIR") == code
    assert text in capsys.readouterr().err


def test_bugs_are_not_hidden(started, monkeypatch):
    def run_ranks(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    with pytest.raises(ZeroDivisionError):
        main(["eval", "DIR"])


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("nemo-opt ")


@pytest.mark.parametrize("command", RESULTS)
def test_reports_have_numbers_and_the_place(command, capsys):
    report.show(RESULTS[command])
    output = capsys.readouterr().out
    expected = {
        "train": ["7.6000 -> 6.5000", "knowing nothing: 7.6200", "2.5 k tokens/s", "1.12 M"],
        "ptq": ["fp8, 32 quantizers", "5.0000 -> 5.0100", "4.68 MB -> 999 B"],
        "ptq_sweep": ["Quantised by 2 algorithms", "written to OUT"],
        "prune": ["5.0000 -> -", "2 B -> 1.12 M", "128 -> 64"],
        "distill": ["5.5000 -> 5.2000", "0.5000 -> 0.2000"],
        "import_ckpt": ["HF", "4.68 GB"],
        "export_ckpt": ["CKPT", "4.68 kB"],
        "evaluate": ["5.0000 over 8192 tokens", "read OUT"],
        "search_recipe": ["5.40, 6 allowed", "1 int4", "written to OUT"],
    }
    for text in ["2.5 s", "OUT", *expected[command]]:
        assert text in output
    assert "num_layers" not in output, "sizes that did not change are left out"


def test_only_rank_zero_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    report.show(RESULTS["ptq"])
    run.write_json(RESULTS["ptq"], tmp_path / "r.json")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "r.json").exists()


def test_errors_under_a_launcher_name_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail():
        raise ConfigError("no")

    assert run.exit_code_of(fail) == 2
    assert capsys.readouterr().err == "rank 1: error: no\n"


def test_a_lost_fork_server_is_not_the_commands_fault(capsys):
    """The suite's runner calls exit code 75 infrastructure."""

    def fail():
        raise ForkServerError("gone")

    assert run.exit_code_of(fail) == 75
    assert capsys.readouterr().err == "failed: gone\n"


def test_upkeep(monkeypatch, tmp_path, capsys):
    from nemo_opt.testing import fixtures, quickstart, suite

    calls = []
    built = fixtures.Fixtures(tmp_path)
    monkeypatch.setattr(fixtures, "build", lambda: built)
    monkeypatch.setattr(fixtures, "show", calls.append)
    monkeypatch.setattr(suite, "main", lambda **settings: calls.append(settings) or 1)
    monkeypatch.setattr(quickstart, "main", lambda output: calls.append(output) or 0)
    assert call("fixtures build") == 0
    assert call("fixtures build --path") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)
    assert call("suite run --tier L2 --only Prune") == 1
    assert call(f"quickstart --output {tmp_path}") == 0
    assert calls[0] is built
    assert (calls[1]["tier"], calls[1]["only"]) == ("L2", ["Prune"])
    assert calls[2] == tmp_path


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "nemo_opt.cli", "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "nemo-opt")
