"""NeMo's flags in, validated settings out: the three scripts with the launch replaced by a recorder."""

import pytest

from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.scripts import _common, gpt_prune, gpt_train, ptq

PTQ = ["-nc", "CKPT", "-out", "OUT", "--export_format", "nemo"]
PRUNE = ["--restore_path", "CKPT", "--save_path", "OUT"]
TRAIN = [
    "--name",
    "run",
    "--model_path",
    "CKPT",
    "--log_dir",
    "LOGS",
    "--max_steps",
    "20",
    "--gbs",
    "8",
    "--mbs",
    "4",
    "--seq_length",
    "64",
]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What a script would start, as (command, settings)."""
    calls = []

    def start(command, **settings):
        calls.append((command, settings))

    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_common, "start", start)
    monkeypatch.setattr(_common, "show", lambda _: None)
    return calls


def refused(capsys, code):
    assert code == 2
    return capsys.readouterr().err


class TestPtq:
    def test_nemos_defaults(self, started, capsys):
        assert ptq.main(PTQ) == 0
        [(command, settings)] = started
        assert command == "ptq"
        assert settings["quantization"] == QuantizationConfig(
            algorithm="fp8",
            calibration_dataset="builtin",
            calibration_dataset_size=512,
            calibration_batch_size=64,
            calibration_seq_len=128,
            sq_alpha=0.5,
            awq_block_size=128,
            kv_cache_qformat="fp8",
        )
        assert settings["export"] == ExportConfig(path="OUT", export_format="nemo", dtype="bf16")
        assert (settings["topology"], settings["devices"]) == (Topology(), 1)
        assert "built-in corpus" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "topology", "devices"),
        [
            (["-ctp", "2"], Topology(tp=2), 2),
            (["-cpp", "2"], Topology(pp=2), 2),
            (["--calib_tp", "2", "--calib_pp", "2"], Topology(tp=2, pp=2), 4),
            (["-cpp", "2", "--devices", "2"], Topology(pp=2), 2),
            (["-cpp", "2", "--devices", "2", "--num_nodes", "1"], Topology(pp=2), 2),
            (["-ctp", "2", "--devices", "4", "-nodes", "1"], Topology(tp=2), 4),
            (["-cpp", "2", "--num_layers_in_first_pipeline_stage", "3"], Topology(pp=2, first_stage_layers=3), 2),
        ],
    )
    def test_layouts(self, started, flags, topology, devices):
        assert ptq.main([*PTQ, *flags]) == 0
        assert (started[0][1]["topology"], started[0][1]["devices"]) == (topology, devices)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--trust_remote_code"], "--trust_remote_code is not supported"),
            (["-calib_ds", "cnn_dailymail"], "cnn_dailymail would have to be downloaded"),
            (["-algo", "fp9"], "fp9"),
            (["-ctp", "2", "--devices", "3", "--num_nodes", "1"], "world_size 3"),
            (["-nodes", "2", "-cpp", "2"], "start the script with torchrun on each node"),
            (["--devices", "0"], "devices 0"),
        ],
    )
    def test_refusals(self, started, capsys, flags, message):
        assert message in refused(capsys, ptq.main([*PTQ, *flags]))
        assert not started

    @pytest.mark.parametrize(("flags", "expected"), [([], "trtllm"), (["--export_format", "hf"], "hf")])
    def test_export_formats(self, started, flags, expected):
        assert ptq.main([*PTQ[:4], *flags]) == 0
        assert started[0][1]["export"].export_format == expected

    def test_no_quant_and_legacy(self, started, capsys):
        assert ptq.main([*PTQ, "-algo", "no_quant", "--legacy_ckpt", "--disable_kv_cache"]) == 0
        assert started[0][1]["quantization"].algorithm is None
        assert "--legacy_ckpt has no effect" in capsys.readouterr().err

    def test_own_calibration_text(self, started):
        assert ptq.main([*PTQ, "-calib_ds", "text.jsonl", "-bs", "4"]) == 0
        data = started[0][1]["data"]
        assert (data.paths, data.micro_batch_size) == (["text.jsonl"], 4)

    def test_under_torchrun(self, started, monkeypatch):
        for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert ptq.main([*PTQ, "-ctp", "2", "-cpp", "2", "--devices", "2", "-nodes", "2"]) == 0
        assert started[0][1]["devices"] == 2

    def test_missing_flag_is_a_usage_error(self):
        with pytest.raises(SystemExit) as end:
            ptq.main(["-out", "OUT"])
        assert end.value.code == 2


class TestPrune:
    TARGETS = ("--seq_length", "128", "--target_hidden_size", "64", "--target_num_layers", "2")

    def test_nemos_flags(self, started):
        flags = ["--devices", "2", "--pp_size", "2", "--mbs", "2", "--num_train_samples", "32", "--data_paths", "1.0", "PREFIX"]
        assert gpt_prune.main([*PRUNE, *self.TARGETS, *flags]) == 0
        [(command, settings)] = started
        assert command == "prune"
        assert settings["pruning"].targets == {"hidden_size": 64, "num_layers": 2}
        assert settings["data"] == DataConfig(
            paths=["1.0", "PREFIX"], split="99,1,0", seq_length=128, micro_batch_size=2, global_batch_size=2
        )
        assert (settings["topology"], settings["devices"], settings["num_train_samples"]) == (Topology(pp=2), 2, 32)

    def test_builtin_corpus_and_mock(self, started, capsys):
        assert gpt_prune.main([*PRUNE, *self.TARGETS]) == 0
        assert "built-in corpus" in capsys.readouterr().err
        assert gpt_prune.main([*PRUNE, *self.TARGETS, "--use_mock_data"]) == 0
        assert [bool(s["data"].mock) for _, s in started] == [False, True]

    def test_dropping_layers_needs_no_data(self, started, capsys):
        flags = ["--drop_layers", "2", "4", "--tp_size", "2", "--devices", "2", "--legacy_ckpt"]
        assert gpt_prune.main([*PRUNE, *flags]) == 0
        assert started[0][1]["pruning"].drop_layers == (2, 4)
        assert started[0][1]["data"] is None
        assert "--legacy_ckpt has no effect" in capsys.readouterr().err

    def test_saved_scores_need_no_data(self, started):
        flags = ["--tp_size", "2", "--devices", "2", "--target_hidden_size", "64", "--target_num_query_groups", "2"]
        assert gpt_prune.main([*PRUNE, *flags, "--scores", "S", "--report", "R.html"]) == 0
        [(_, settings)] = started
        assert (settings["scores"], settings["save_scores"], settings["report"], settings["data"]) == ("S", None, "R.html", None)
        assert settings["topology"] == Topology(tp=2)
        assert settings["pruning"].targets == {"hidden_size": 64, "num_query_groups": 2}
        assert gpt_prune.main([*PRUNE, *self.TARGETS, "--save_scores", "S"]) == 0
        assert (started[1][1]["scores"], started[1][1]["save_scores"]) == (None, "S")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--target_hidden_size", "64"], "--seq_length must be given"),
            ([*TARGETS, "--mbs", "3"], "num_train_samples must be divisible by mbs"),
            ([*TARGETS, "--drop_layers", "1"], "drop_layers cannot be used"),
            ([*TARGETS, "--target_mamba_num_heads", "2"], "Mamba"),
            ([*TARGETS, "--num_nodes", "2"], "torchrun"),
            ([*TARGETS, "--pp_size", "2"], "world_size 1"),
        ],
    )
    def test_refusals(self, started, capsys, flags, message):
        assert message in refused(capsys, gpt_prune.main([*PRUNE, *flags]))
        assert not started


class TestTrain:
    def test_training(self, started, capsys):
        assert gpt_train.main([*TRAIN, "--data_paths", "PREFIX", "--tp_size", "2", "--devices", "2"]) == 0
        [(command, settings)] = started
        assert command == "train"
        assert (settings["checkpoint"], settings["output"], settings["log_dir"]) == ("CKPT", "LOGS/run/checkpoint", "LOGS/run")
        assert settings["topology"] == Topology(tp=2, sp=True), "NeMo turns sequence parallelism on with tp"
        training = settings["training"]
        assert (training.lr, training.min_lr, training.val_check_interval, training.limit_val_batches) == (1e-4, 1e-5, 100, 32)
        assert training.warmup_steps == 19
        errors = capsys.readouterr().err
        assert "warmup_steps 50 -> 19" in errors
        assert "float32 without a GPU" in errors

    def test_distillation(self, started):
        flags = ["--teacher_path", "TEACHER", "--kd_config", "kd.yaml", "--use_mock_data", "--pp_size", "2", "--devices", "2"]
        assert gpt_train.main([*TRAIN, *flags]) == 0
        [(command, settings)] = started
        assert command == "distill"
        assert (settings["student"], settings["teacher"], settings["distillation"]) == ("CKPT", "TEACHER", "kd.yaml")
        assert settings["data"].mock
        assert (settings["resume"], settings["save_interval"], settings["eval_batches"]) == (False, 100, 8)

    def test_own_flags_of_a_distillation(self, started):
        flags = ["--teacher_path", "TEACHER", "--use_mock_data", "--save_interval", "0", "--report", "R.html", "--eval_batches", "3"]
        assert gpt_train.main([*TRAIN, *flags]) == 0
        [(_, settings)] = started
        assert (settings["save_interval"], settings["report"], settings["eval_batches"]) == (0, "R.html", 3)

    @pytest.mark.parametrize(("flags", "command", "source"), [([], "train", "checkpoint"), (["--teacher_path", "T"], "distill", "student")])
    def test_an_interrupted_run_goes_on(self, started, capsys, tmp_path, flags, command, source):
        left = tmp_path / "run" / "checkpoint-resume"
        left.mkdir(parents=True)
        assert gpt_train.main([*TRAIN, "--use_mock_data", "--log_dir", str(tmp_path), *flags]) == 0
        [(started_command, settings)] = started
        assert (started_command, settings["resume"], settings[source]) == (command, True, str(left))
        assert f"going on from {left}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "Must provide either custom dataset(s) in --data_paths or set --use_mock_data."),
            (["--use_mock_data", "--use-chat-data"], "--use-chat-data is not supported"),
            (["--use_mock_data", "--chat-template-path", "x"], "--chat-template-path is not supported"),
            (["--use_mock_data", "--kd_config", "x"], "--kd_config x without --teacher_path"),
            (["--use_mock_data", "--report", "x"], "--report x without --teacher_path"),
            (["--use_mock_data", "--precision", "fp7"], "--precision 'fp7'"),
            (["--use_mock_data", "--cp_size", "2"], "world_size 1"),
            (["--use_mock_data", "--data_paths", "x"], "exclude each other"),
        ],
    )
    def test_refusals(self, started, capsys, flags, message):
        assert message in refused(capsys, gpt_train.main([*TRAIN, *flags]))
        assert not started

    def test_legacy(self, started, capsys):
        assert gpt_train.main([*TRAIN, "--use_mock_data", "--legacy_ckpt"]) == 0
        assert "--legacy_ckpt has no effect" in capsys.readouterr().err


def test_result_is_written(started, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(_common, "write_json", lambda result, path: written.append(path))
    assert ptq.main([*PTQ, "--result_json", str(tmp_path / "r.json")]) == 0
    assert written == [tmp_path / "r.json"]


def test_start_count_under_torchrun_checks_the_world(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="world_size 3"):
        _common.start_count(Topology(tp=2), 2, 1, nodes_given=False)
