"""The reload check with models replaced by small functions: every layout sees the same samples, and a difference is seen as one."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import nemo_opt._stack

import pytest
import torch
import transformers

from nemo_opt import api
from nemo_opt.api import _session
from nemo_opt.checkpoint import info, load
from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.testing import reload

DATA = DataConfig(paths=["text"], split="99,1,0", seq_length=4, micro_batch_size=2, global_batch_size=2)
MODEL = preset("tiny")
TOKENS_BS = torch.arange(8).view(2, 4)
LOGITS_BSV = torch.linspace(-8.0, 4.0, 8 * (MODEL.vocab_size + 64)).view(2, 4, -1)  # 64 rows that pad the vocabulary


@pytest.fixture
def described(monkeypatch):
    monkeypatch.setattr(info, "read_info", lambda _: SimpleNamespace(model=MODEL, tokenizer_dir=None))


@pytest.mark.parametrize("name", ["TP1PP1", "TP2PP1", "TP1PP2"])
def test_samples(name):
    topology = Topology.from_name(name)
    assert reload._eval_batches(topology) * topology.resolve(2).dp == 8, "the same samples, shared by the data parallel ranks"


def test_reload(described, monkeypatch, tmp_path):
    calls = []

    def evaluate(*, path, data, topology, eval_batches):
        calls.append((path, topology.name, eval_batches))
        opened = path == str(tmp_path)
        return SimpleNamespace(layout=topology.resolve(2).name, loss=3.5 if opened else 3.0 + topology.tp, parameters=7 if opened else 6)

    def export_ckpt(*, checkpoint, output, topology):
        calls.append((checkpoint, topology.name, "export"))
        (tmp_path / "config.json").write_text('{"head_dim": 16}')
        assert output == str(tmp_path)

    monkeypatch.setattr(api, "evaluate", evaluate)
    monkeypatch.setattr(api, "export_ckpt", export_ckpt)
    monkeypatch.setattr(reload, "_logits_difference", lambda checkpoint, folder, data: 0.25)
    result = reload.reload(checkpoint="C", data=DATA, layouts=["TP1PP1", "TP2PP1"], folder=str(tmp_path))
    names = Topology().name, Topology(tp=2).name
    assert calls == [("C", names[0], 4), ("C", names[1], 8), ("C", names[1], "export"), (str(tmp_path), names[0], 4)]
    assert result == {
        "losses": {"TP1PP1DP2": 4.0, "TP2PP1": 5.0},
        "parameters": [6],
        "model": MODEL.to_dict(),
        "transformers_loss": 3.5,
        "transformers_parameters": 7,
        "transformers_config": {"head_dim": 16},
        "logits_difference": 0.25,
    }


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (0.5, 0.5 / 8), (float("nan"), float("nan"))])
def test_logits_difference(shift, expected, described, monkeypatch):
    def ours(tokens, positions, mask):
        return LOGITS_BSV

    def theirs(*, input_ids, position_ids):
        logits_BSV = LOGITS_BSV[..., : MODEL.vocab_size].clone()
        logits_BSV[1, 2, 3] += shift
        return SimpleNamespace(logits=logits_BSV)

    @contextmanager
    def session(topology, model):
        assert model is MODEL
        yield SimpleNamespace(topology=topology)

    def opened(folder, *, dtype, local_files_only):
        assert (folder, dtype, local_files_only) == ("HF", torch.float32, True)
        return stub(theirs)

    def stub(function):
        return SimpleNamespace(eval=lambda: function, to=lambda device: stub(function))

    feed = SimpleNamespace(valid_batches=lambda: [{"tokens": TOKENS_BS, "position_ids": TOKENS_BS}])
    monkeypatch.setattr(_session, "session", session)
    monkeypatch.setattr(_session, "open_feed", lambda data, tokenizer, *, eval_batches: feed)
    monkeypatch.setattr(load, "restore_model", lambda checkpoint, topology: ([stub(ours)], None))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", opened)
    assert reload._logits_difference("C", "HF", DATA) == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_command(monkeypatch, tmp_path, capsys):
    def run_ranks(target, settings, *, devices):
        assert (target, devices) == ("nemo_opt.testing.reload:reload", 2)
        assert (settings["checkpoint"], settings["layouts"]) == ("C", ["TP1PP1", "TP2PP1"])
        assert settings["data"] == DataConfig(paths=["text"], split="99,1,0", seq_length=64, micro_batch_size=2, global_batch_size=2)
        return {"losses": {"TP2PP1": 5.0}}

    monkeypatch.setattr(reload, "run_ranks", run_ranks)
    arguments = ["C", "--data", "text", "--seq-length", "64", "--json", str(tmp_path / "r.json")]
    assert reload.main(arguments) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == {"losses": {"TP2PP1": 5.0}}

    def refuses(*_, **__):
        raise ConfigError("tp 3 > 2 ranks")

    monkeypatch.setattr(reload, "run_ranks", refuses)
    (tmp_path / "r.json").unlink()
    assert reload.main(arguments) == 2
    assert capsys.readouterr().err == "error: tp 3 > 2 ranks\n"
    assert not (tmp_path / "r.json").exists()
