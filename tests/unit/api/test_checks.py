"""What is refused before the stack is loaded: every check, with the message that helps."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import nemo_opt.api as api
from nemo_opt.api import checks
from nemo_opt.api.resumable import marks
from nemo_opt.checkpoint.info import CheckpointInfo, write_info
from nemo_opt.checkpoint.manifest import hash_files, list_files, write_manifest
from nemo_opt.data.corpus import builtin_documents
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.errors import CheckpointError, ConfigError, DataError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface_config import config_to_hf
from nemo_opt.models.huggingface_names import hf_shapes
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.training.config import TrainingConfig

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=300, max_position_embeddings=64
)
ONE = {"topology": Topology(), "world_size": 1}
TP2 = {"topology": Topology(tp=2), "world_size": 2}
QUANTIZATION = QuantizationConfig(calibration_seq_len=32, calibration_dataset_size=8, calibration_batch_size=4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for size in (300, 320):
        train_tokenizer(builtin_documents()[:20], size, root / str(size))
    return root


@pytest.fixture
def place(tmp_path, tokenizers):
    """A directory with the header of a checkpoint, `ckpt`, and variants of it."""
    make(tmp_path / "ckpt", tokenizers / "300")
    (tmp_path / "text.txt").write_text("some words\n")
    return tmp_path


def make(path, tokenizer=None, **changes):
    path.mkdir()
    write_info(CheckpointInfo(**({"path": path, "model": MODEL, "topology": Topology()} | changes)), path)
    if tokenizer:
        shutil.copytree(tokenizer, path / "tokenizer")
    write_manifest(path, hash_files(path, list_files(path)))
    return str(path)


def make_hf(path, model=MODEL, **changes):
    """A Hugging Face directory of `model`, its config.json with `changes`."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(model, dtype="float16") | changes))
    save_file({name: np.zeros(shape, np.float16) for name, shape in hf_shapes(model).items()}, path / "model.safetensors")
    return str(path)


def data(place, **changes):
    values = {"paths": [str(place / "text.txt")], "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4}
    return api.data_config(**(values | changes))


def training(**changes):
    values = {"max_steps": 3, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4}
    return TrainingConfig(**(values | changes))


def ptq(place, **changes):
    export = ExportConfig(path=place / "out", export_format="nemo")
    values = {"checkpoint": str(place / "ckpt"), "quantization": QUANTIZATION, "export": export, "data": data(place), **ONE}
    checks.check_ptq(**(values | changes))


def sweep(place, **changes):
    values = {"checkpoint": str(place / "ckpt"), "output": str(place / "out"), "quantization": QUANTIZATION, "data": data(place), **ONE}
    checks.check_ptq_sweep(**({"algorithms": ["fp8", "int4"]} | values | changes))


def prune(place, **changes):
    pruning = PruningConfig(target_hidden_size=16)
    values = {"checkpoint": str(place / "ckpt"), "output": str(place / "out"), "pruning": pruning, "data": data(place), **ONE}
    checks.check_prune(**(values | changes))


def distill(place, **changes):
    student, output = str(place / "ckpt"), str(place / "out")
    values = {"student": student, "teacher": student, "output": output, "data": data(place), "training": training(), **ONE}
    checks.check_distill(**(values | changes))


def train(place, **changes):
    values = {"output": str(place / "out"), "checkpoint": str(place / "ckpt"), "data": data(place), "training": training(), **ONE}
    checks.check_train(**(values | changes))


def evaluate(place, **changes):
    checks.check_evaluate(**({"path": str(place / "ckpt"), "data": data(place), **ONE} | changes))


@pytest.mark.parametrize("check", [ptq, sweep, prune, distill, train, evaluate])
def test_good_settings_pass(place, check):
    check(place)


@pytest.mark.parametrize("check", [ptq, sweep, prune, distill, train, evaluate])
def test_layouts_and_data(place, check):
    with pytest.raises(ConfigError, match=r"world_size 3|!= 3 ranks"):
        check(place, topology=Topology(pp=2), world_size=3)
    long = {"training": training(seq_length=128)} if check in (distill, train) else {}
    with pytest.raises(ConfigError, match=r"seq_length 128 > max_position_embeddings 64"):
        check(place, data=data(place, seq_length=128), **long)
    with pytest.raises(DataError, match=r"missing\.txt"):
        check(place, data=data(place, paths=[str(place / "missing.txt")]))


@pytest.mark.parametrize(
    ("check", "name"), [(ptq, "checkpoint"), (sweep, "checkpoint"), (prune, "checkpoint"), (distill, "student"), (train, "checkpoint")]
)
def test_checkpoints(place, check, name):
    with pytest.raises(CheckpointError, match="does not exist"):
        check(place, **{name: str(place / "nowhere")})
    hf = place / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="nemo-opt import"):
        check(place, **{name: str(hf)})


@pytest.mark.parametrize("check", [ptq, sweep, prune, distill, train])
def test_outputs(place, check):
    output = place / "out"
    output.mkdir()
    check(place)
    (output / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        check(place)
    check(place, overwrite=True)


def test_output_file(place):
    with pytest.raises(ConfigError, match="is a file"):
        checks.check_output(place / "text.txt", overwrite=True)


@pytest.mark.parametrize("check", [ptq, sweep, prune, distill, train, evaluate])
def test_tokenizers(place, check, tokenizers):
    with pytest.raises(ConfigError, match=r"320 tokens.*vocabulary of 300"):
        check(place, tokenizer=str(tokenizers / "320"))
    bare = {"checkpoint": make(place / "bare")}
    bare = {evaluate: {"path": bare["checkpoint"]}, distill: {"student": bare["checkpoint"]}}.get(check, bare)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check(place, **bare)
    check(place, **bare, tokenizer=str(tokenizers / "300"))


@pytest.mark.parametrize("check", [ptq, sweep])
def test_quantisation(place, check):
    with pytest.raises(ConfigError, match="already quantised"):
        check(place, checkpoint=make(place / "fp8", has_modelopt_state=True))
    with pytest.raises(ConfigError, match="calibration_seq_len 16"):
        check(place, quantization=replace(QUANTIZATION, calibration_seq_len=16))
    with pytest.raises(ConfigError, match="vp 2"):
        check(place, topology=Topology(pp=2, vp=2), world_size=2)
    with pytest.raises(ConfigError, match="eval_batches -1"):
        check(place, eval_batches=-1)
    with pytest.raises(ConfigError, match=r"report .* the directory .*/missing does not exist"):
        check(place, report=str(place / "missing" / "page.html"))
    check(place, report=str(place / "page.html"))


def test_ptq(place):
    ptq(place, export=ExportConfig(path=place / "out", export_format="hf"))
    with pytest.raises(ConfigError, match="blocks of 128 do not divide the 32 inputs of linear_qkv"):
        ptq(place, quantization=replace(QUANTIZATION, algorithm="int4"))


def test_sweep(place):
    sweep(place, export_format=None)
    sweep(place, algorithms=["int4", "block_fp8"])  # blocks are reduced to what fits
    (place / "mixed.yaml").touch()
    assert checks.sweep_name(str(place / "mixed.yaml")) == "mixed"
    assert checks.sweep_name("FP8_KV_CFG") == "FP8_KV_CFG"
    sweep(place, algorithms=[str(place / "mixed.yaml"), "fp8"])
    with pytest.raises(ConfigError, match="Unsupported export format 'gguf'"):
        sweep(place, export_format="gguf")
    with pytest.raises(ConfigError, match="TensorRT-LLM"):
        sweep(place, export_format="trtllm", **TP2)
    for algorithms in ([], ["fp8", "fp8"]):
        with pytest.raises(ConfigError, match="give at least one, and none twice"):
            sweep(place, algorithms=algorithms)
    with pytest.raises(ConfigError, match="Unsupported quantization algorithm 'int3'"):
        sweep(place, algorithms=["fp8", "int3"])


def test_prune(place):
    prune(place, **TP2)
    prune(place, world_size=2)
    with pytest.raises(ConfigError, match="vp 2"):
        prune(place, topology=Topology(pp=2, vp=2), world_size=2)
    with pytest.raises(ConfigError, match="prune the original"):
        prune(place, checkpoint=make(place / "fp8", has_modelopt_state=True))
    with pytest.raises(ConfigError, match="is a multiple of tp 2; nearest: 14 or 16"):
        prune(place, pruning=PruningConfig(target_ffn_hidden_size=15), **TP2)
    with pytest.raises(ConfigError, match="none is given"):
        prune(place, data=None)
    with pytest.raises(ConfigError, match="num_train_samples 3 % micro_batch_size 2"):
        prune(place, num_train_samples=3)
    with pytest.raises(ConfigError, match="num_train_samples 0 <"):
        prune(place, num_train_samples=0)
    with pytest.raises(ConfigError, match="target_hidden_size 64"):
        prune(place, pruning=PruningConfig(target_hidden_size=64))
    prune(place, pruning=PruningConfig(drop_layers=(1, 2)), data=None, **TP2)


def test_prune_importance(place, monkeypatch):
    dropping = {"pruning": PruningConfig(drop_layers=(1,))}
    with pytest.raises(CheckpointError, match=r"importance scores .* do not exist"):
        prune(place, scores=str(place / "scores"))
    (place / "scores").touch()
    prune(place, scores=str(place / "scores"), data=None, save_scores=str(place / "again"), report=str(place / "r.html"))
    for name in ("scores", "save_scores"):
        with pytest.raises(ConfigError, match="need no importance"):
            prune(place, **dropping, **{name: str(place / "scores")})
    for name in ("save_scores", "report"):
        with pytest.raises(ConfigError, match=f"{name} .* is a directory"):
            prune(place, **{name: str(place)})
        with pytest.raises(ConfigError, match=f"{name} .* the directory .*/missing does not exist"):
            prune(place, **{name: str(place / "missing" / "file")})
    prune(place, **dropping, report=str(place / "r.html"))
    monkeypatch.setattr("nemo_opt.pages.can_plot", lambda: False)
    prune(place)
    with pytest.raises(ConfigError, match=r"install nemo_opt\[plots\]"):
        prune(place, report=str(place / "r.html"))


def test_prune_search(place):
    prune(place, pruning=PruningConfig(target_params=35_000))
    with pytest.raises(ConfigError, match="no architecture of the search space fits params <= 10"):
        prune(place, pruning=PruningConfig(target_params=10))
    with pytest.raises(ConfigError, match="eval_batches is 0"):
        prune(place, pruning=PruningConfig(target_params=35_000), eval_batches=0)
    with pytest.raises(ConfigError, match="within the limits already"):
        prune(place, pruning=PruningConfig(target_params=1e6))
    (place / "scores").touch()
    with pytest.raises(ConfigError, match="8 evaluation batches asked for, but no data"):
        prune(place, pruning=PruningConfig(target_params=35_000), data=None, scores=str(place / "scores"))


def test_distill(place, tokenizers, monkeypatch):
    distill(place, student=make(place / "fp8", tokenizers / "300", has_modelopt_state=True))
    with pytest.raises(ConfigError, match=r"kd\.yaml"):
        distill(place, distillation=str(place / "kd.yaml"))
    with pytest.raises(ConfigError, match="vp 2"):
        distill(place, topology=Topology(pp=2, vp=2), world_size=2)
    with pytest.raises(ConfigError, match="global_batch_size 4 of the data != 8"):
        distill(place, training=training(global_batch_size=8))
    with pytest.raises(ConfigError, match="global_batch_size 4 %"):
        distill(place, world_size=4)
    distill(place, save_interval=2)
    with pytest.raises(ConfigError, match="save_interval -1 < 0"):
        distill(place, save_interval=-1)
    distill(place, report=str(place / "page.html"))
    with pytest.raises(ConfigError, match=r"report .* the directory .*/missing does not exist"):
        distill(place, report=str(place / "missing" / "page.html"))
    monkeypatch.setattr("nemo_opt.pages.can_plot", lambda: False)
    with pytest.raises(ConfigError, match=r"install nemo_opt\[plots\]"):
        distill(place, report=str(place / "page.html"))


def test_distill_resumes(place, tokenizers):
    with pytest.raises(ConfigError, match="holds no optimizer state: start from its weights, without resuming"):
        distill(place, resume=True)
    halfway = make(place / "halfway", tokenizers / "300", has_optimizer=True, iteration=3, extra=marks("distill"))
    with pytest.raises(ConfigError, match="step 3 of max_steps 3: ask for more steps"):
        distill(place, student=halfway, resume=True)
    distill(place, student=halfway, resume=True, training=training(max_steps=4))
    trained = make(place / "trained", tokenizers / "300", has_optimizer=True, iteration=3)
    with pytest.raises(ConfigError, match="trained is of a training, a distillation cannot go on from it"):
        distill(place, student=trained, resume=True, training=training(max_steps=4))
    make(place / "out-resume", has_optimizer=True, iteration=1, extra=marks("distill"))
    with pytest.raises(ConfigError, match="out-resume is what an interrupted distillation left at step 1: resume from it"):
        distill(place, student=halfway, resume=True, training=training(max_steps=4), save_interval=1)
    with pytest.raises(ConfigError, match="an interrupted distillation left at step 1: resume from it"):
        distill(place, save_interval=1)
    distill(place, save_interval=1, overwrite=True)


def test_distill_names_the_layers_that_there_are(place, tokenizers):
    deep = make_hf(place / "deep", MODEL.with_(num_layers=6))

    def pair(*names):
        return {"teacher": deep, "distillation": DistillationConfig(intermediate_layer_pairs=[names])}

    distill(place, **pair("decoder.layers.3", "decoder.layers.5"))
    with pytest.raises(ConfigError, match=r"'decoder\.layers\.4' is not in the student, whose layers are 0\.\.3"):
        distill(place, **pair("decoder.layers.4", "decoder.layers.5"))
    with pytest.raises(ConfigError, match=r"'decoder\.layers\.6\.mlp' is not in the teacher, whose layers are 0\.\.5"):
        distill(place, **pair("decoder.layers.3", "decoder.layers.6.mlp"))
    settings = place / "kd.yaml"
    settings.write_text("intermediate_layer_pairs: [[decoder.layers.3, decoder.layers.6]]")
    with pytest.raises(ConfigError, match=r"not in the teacher, whose layers are 0\.\.5"):
        distill(place, teacher=deep, distillation=str(settings))
    settings.write_text("intermediate_layer_pairs: [[decoder.layers.3, decoder.layer.5]]")
    with pytest.raises(ConfigError, match=r"did you mean 'decoder\.layers\.0'"):
        distill(place, teacher=deep, distillation=str(settings))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_teachers(place, tokenizers):
    """Each refusal reads headers only; that it comes before any work is tested with the command line."""
    distill(place, teacher=make_hf(place / "hf", MODEL.with_(hidden_size=48, num_layers=2)), **TP2)
    for teacher, message in ((place / "nowhere", "does not exist"), (place / "text.txt", "is a file"), (place, "is neither a checkpoint")):
        with pytest.raises(CheckpointError, match=f"teacher {teacher} {message}"):
            distill(place, teacher=str(teacher))
    with pytest.raises(ConfigError, match=r"is quantised .*: give the model that it was made from"):
        distill(place, teacher=make(place / "fp8", tokenizers / "300", has_modelopt_state=True))
    with pytest.raises(ConfigError, match=r"num_attention_heads 4 % tp 3|% tp 3"):
        distill(place, topology=Topology(tp=3), world_size=3)


def test_teachers_on_the_command_line(place, tokenizers):
    """Exit code 2 and one line, before torch is loaded and before anything is written."""
    settings = place / "kd.yaml"
    settings.write_text("intermediate_layer_pairs: [[decoder.layers.3, decoder.layers.9]]")
    truncate(Path(make_hf(place / "cut")) / "model.safetensors")
    truncate(Path(make(place / "damaged", tokenizers / "300")) / "tokenizer" / "tokenizer.json")
    make(place / "fp8", tokenizers / "300", has_modelopt_state=True)
    make_hf(place / "fewer", MODEL.with_(vocab_size=290))
    cases = {
        "nowhere": "nowhere does not exist",
        "text.txt": "text.txt is a file",
        "cut": "no whole safetensors file",
        "damaged": "tokenizer.json is truncated",
        "fp8": "is quantised",
        "fewer": "of the teacher 290",
        f"ckpt --kd-config {settings}": "whose layers are 0..3",
    }
    flags = f"--seq-length 32 --mbs 2 --gbs 4 --data {place / 'text.txt'}"
    commands = [f"distill {place / 'ckpt'} {place / case} {place / 'out'} {flags}".split() for case in cases]
    code = f"""
import sys
from nemo_opt.cli import main
sys.stderr = sys.stdout
for command in {commands!r}:
    print("CASE")
    try: main(command)
    except SystemExit as end: print("EXIT", end.code)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = done.stdout.split("CASE")[1:]
    for (case, message), answer in zip(cases.items(), answers, strict=True):
        assert message in " ".join(answer.split()), f"{case}: {answer}"
        assert "EXIT 2" in answer, f"{case}: {answer}"
        assert "Traceback" not in answer
    assert not (place / "out").exists()


def test_vocabularies_of_teachers(place, tokenizers):
    """Rows that are no tokens may differ; other words may not."""
    distill(place, teacher=make(place / "more", tokenizers / "300", model=MODEL.with_(vocab_size=400)))
    with pytest.raises(ConfigError, match="student has 300 rows, of the teacher 290, their tokenizer has 300 tokens: 10 of them"):
        distill(place, teacher=make_hf(place / "fewer", MODEL.with_(vocab_size=290)))
    wide = make(place / "wide", tokenizers / "300", model=MODEL.with_(vocab_size=320))
    distill(place, student=wide)
    with pytest.raises(ConfigError, match="student has 320 rows, of the teacher 300, their tokenizer has 320 tokens: 20 of them"):
        distill(place, student=wide, tokenizer=str(tokenizers / "320"))
    other = train_tokenizer(builtin_documents()[20:40], 300, place / "other").path
    with pytest.raises(ConfigError, match="is not the student's"):
        distill(place, teacher=make(place / "stranger", other))


def test_train(place, tokenizers):
    with pytest.raises(ConfigError, match="exactly one"):
        train(place, model=MODEL)
    with pytest.raises(ConfigError, match="no tokenizer yet"):
        train(place, model=MODEL, checkpoint=None)
    with pytest.raises(ConfigError, match="320 tokens"):
        train(place, model=MODEL, checkpoint=None, tokenizer=str(tokenizers / "320"))
    train(place, model=MODEL, checkpoint=None, tokenizer=str(tokenizers / "300"))
    with pytest.raises(ConfigError, match="no optimizer state"):
        train(place, resume=True)
    done = make(place / "done", tokenizers / "300", has_optimizer=True, iteration=3)
    with pytest.raises(ConfigError, match="step 3 of max_steps 3"):
        train(place, checkpoint=done, resume=True)
    train(place, checkpoint=done, resume=True, training=training(max_steps=4))
    with pytest.raises(ConfigError, match="save_interval -1 < 0"):
        train(place, save_interval=-1)
    left = make(place / "out-resume", tokenizers / "300", has_optimizer=True, iteration=1, extra=marks("train"))
    with pytest.raises(ConfigError, match="an interrupted training left at step 1: resume from it, remove it, or ask"):
        train(place, save_interval=1)
    with pytest.raises(ConfigError, match="an interrupted training left at step 1"):
        train(place, checkpoint=done, resume=True, training=training(max_steps=4), save_interval=1)
    train(place, checkpoint=left, resume=True, save_interval=1)


def test_evaluate(place):
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate(place, path=str(place / "nowhere"))
    with pytest.raises(ConfigError, match="eval_batches 0"):
        evaluate(place, eval_batches=0)
    hf = place / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    evaluate(place, path=str(hf))
    with pytest.raises(ConfigError, match="import it first"):
        evaluate(place, path=str(hf), **TP2)


def test_import_and_export(place):
    with pytest.raises(CheckpointError, match="does not exist"):
        checks.check_import_ckpt(source=str(place / "nowhere"), output=str(place / "out"), **ONE)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        checks.check_import_ckpt(source=str(place), output=str(place / "out"), **ONE)
    (place / "config.json").write_text("{}")
    checks.check_import_ckpt(source=str(place), output=str(place / "out"), **ONE)
    checks.check_export_ckpt(checkpoint=str(place / "ckpt"), output=str(place / "out"), **TP2)
    checks.check_export_ckpt(checkpoint=make(place / "fp8", has_modelopt_state=True), output=str(place / "out"), **ONE)


def test_builtin_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = api.data_config(seq_length=32)
    assert settings.paths == [str(api.builtin_corpus())]
    assert settings.split == "90,10,0"
    lines = Path(settings.paths[0]).read_text().splitlines()
    assert len(lines) > 100
    assert all(json.loads(line)["text"] for line in lines[:10])
    assert api.data_config(["a.txt"], seq_length=32).split == "99,1,0"
    assert api.data_config(mock=True, seq_length=32).mock


def test_results_are_paths(tmp_path):
    result = api.EvalResult(path=str(tmp_path), layout="TP1PP1", spec="te", device="cpu", parameters=1, time_s=0.1, loss=1.0, tokens=2)
    assert Path(result) == tmp_path
    assert result.to_dict()["loss"] == 1.0


def recipe(place, **changes):
    settings = {
        "checkpoint": str(place / "ckpt"),
        "output": str(place / "mixed.yaml"),
        "candidates": [QuantizationConfig(algorithm="int4", awq_block_size=16), QuantizationConfig(algorithm="fp8")],
        "data": data(place),
        "samples": 8,
        **ONE,
    }
    checks.check_search_recipe(**(settings | changes))


def test_recipes(place):
    recipe(place)
    with pytest.raises(ConfigError, match=r"mixed\.txt must end in \.json"):
        recipe(place, output=str(place / "mixed.txt"))
    with pytest.raises(ConfigError, match="missing does not exist: make it"):
        recipe(place, output=str(place / "missing" / "mixed.yaml"))
    (place / "mixed.yaml").touch()
    with pytest.raises(ConfigError, match=r"mixed\.yaml exists"):
        recipe(place)
    recipe(place, overwrite=True)
    (place / "mixed.yaml").unlink()
    with pytest.raises(ConfigError, match=r"candidates \['int4_awq'\] cannot be searched: choose among"):
        recipe(place, candidates=[QuantizationConfig(algorithm="int4_awq")])
    with pytest.raises(ConfigError, match="pp 2: the search for mixed precision needs pp 1"):
        recipe(place, topology=Topology(pp=2), world_size=2)
    with pytest.raises(ConfigError, match="already quantised"):
        recipe(place, checkpoint=make(place / "fp8", has_modelopt_state=True))
    with pytest.raises(ConfigError, match="blocks of 128 do not divide the 32 inputs"):
        recipe(place, candidates=[QuantizationConfig(algorithm="int4")])
    with pytest.raises(ConfigError, match="samples 1 < micro-batch size 2"):
        recipe(place, samples=1)
