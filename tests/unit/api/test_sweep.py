"""A sweep over algorithms whose quantisation is a stand-in: what fails, what is written, and what the summary of SQNR says."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import nemo_opt._stack

import pytest

from nemo_opt.api import compress
from nemo_opt.api import sweep as sweeping
from nemo_opt.api.results import PtqResult
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import QuantizationConfig
from nemo_opt.quantize.sqnr import Rounding

FACTS = {"layout": "TP1PP1", "spec": "te", "device": "cpu/gloo", "parameters": 10, "time_s": 1.0}


def result(**changes):
    values = {"path": "OUT", "algorithm": "fp8", "export_format": "nemo", "loss_before": 5.0, "loss_after": 5.1, "quantizers": 2}
    return PtqResult(**(FACTS | values | {"bytes_before": 1, "bytes_after": 1, "bits_per_parameter": 12.0} | changes))


@pytest.fixture
def quantised(monkeypatch, tmp_path):
    """A sweep without a model: (configuration, export configuration) of each algorithm; those named `broken` raise."""
    calls, broken = [], {}

    def quantize_and_export(source, chunks, quantizer, loss_before):
        config, export = quantizer
        calls.append((config, export, chunks, loss_before))
        print("a list of all quantizers")
        if config.algorithm in broken:
            raise broken[config.algorithm]
        return result(algorithm=config.algorithm)

    job = SimpleNamespace(topology=Topology(), started=0.0, facts=lambda chunks: dict(FACTS))
    info = SimpleNamespace(model=SimpleNamespace(hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, head_dim=8))
    feed = SimpleNamespace(loss=lambda chunks: 5.0, eval_batches=1)
    restored = iter(range(10))
    for module, name, value in [
        (sweeping, "quantize_and_export", quantize_and_export),
        (sweeping, "Quantizer", lambda config, export: (config, export)),
        (sweeping, "session", lambda *_: nullcontext(job)),
        (sweeping, "read_info", lambda path: info),
        (sweeping, "open_feed", lambda *_, **__: feed),
        (sweeping.checks, "check_ptq_sweep", lambda **_: None),
        (sweeping.checks, "tokenizer_directory", lambda *_: tmp_path),
        (compress, "restore_model", lambda *_, **__: (next(restored), None)),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sweeping.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(sweeping.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sweeping.dist, "all_gather_object", lambda out, own: out.__setitem__(0, own))
    return SimpleNamespace(calls=calls, broken=broken)


def sweep(tmp_path, **changes):
    settings = {"checkpoint": str(tmp_path / "ckpt"), "output": str(tmp_path / "out"), "topology": Topology(), "data": None}
    return sweeping.ptq_sweep(**(settings | {"quantization": QuantizationConfig(sq_alpha=0.25)} | changes))


def test_each_algorithm_starts_from_the_checkpoint(quantised, tmp_path, capsys):
    found = sweep(tmp_path, algorithms=["fp8", "int4"])
    assert list(found.runs) == ["fp8", "int4"]
    assert found.failed == []
    (first, export, chunks, loss), (second, _, others, _) = quantised.calls
    assert (first.algorithm, first.sq_alpha, second.algorithm) == ("fp8", 0.25, "int4")
    assert second.awq_block_size == 32, "reduced to what fits"
    assert (export.path, export.export_format) == (tmp_path / "out" / "fp8", "hf")
    assert (loss, chunks != others) == (5.0, True)
    assert "quantizers" not in capsys.readouterr().out, "the page has them"
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written["kind"] == "SweepResult"
    assert written["runs"]["int4"]["result"]["algorithm"] == "int4"


def test_all_algorithms_are_the_default(quantised, tmp_path):
    assert list(sweep(tmp_path, export_format=None).runs) == list(sweeping.ALGORITHMS)
    assert {export for _, export, *_ in quantised.calls} == {None}


def test_an_algorithm_that_fails_does_not_stop_the_others(quantised, tmp_path, capsys):
    quantised.broken.update(int8=ConfigError("blocks do not fit"), fp8=KeyError("amax"))
    found = sweep(tmp_path, algorithms=["int8", "fp8", "int4"], report=str(tmp_path / "page.html"))
    assert found.failed == ["int8", "fp8"]
    assert found.runs["int8"].error == "blocks do not fit"
    assert found.runs["fp8"].error == "KeyError: 'amax'"
    assert found.runs["int4"].result is not None
    shown = capsys.readouterr().err
    assert "rank 0: fp8 failed:" in shown
    assert "Traceback" in shown
    assert "int8" not in shown, "bad input needs no traceback"
    assert "failed: blocks do not fit" in (tmp_path / "page.html").read_text()


def test_what_failed_on_another_rank_failed(quantised, monkeypatch):
    monkeypatch.setattr(sweeping.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(sweeping.dist, "all_gather_object", lambda out, own: out.__setitem__(slice(None), [own, "out of memory"]))
    run = sweeping._attempt("fp8", result)
    assert (run.result, run.error) == (None, "out of memory")


def test_there_is_a_progress_bar_on_a_terminal(quantised, monkeypatch, capsys):
    monkeypatch.setattr(sweeping.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(sweeping._progress({"mixed": "mixed.yaml"})) == [("mixed", "mixed.yaml")]
    assert "mixed: 100%" in capsys.readouterr().err


def test_summary_of_sqnr():
    def rounding(*values):
        return {f"q{n}": Rounding(sqnr_db=value, amax=None) for n, value in enumerate(values)}

    assert compress._summary(rounding(30.0, 20.0, 25.0)) == {"median": 25.0, "worst": 20.0, "worst_name": "q1"}
    assert compress._summary(rounding(None, 20.0, None)) == {"median": None, "worst": 20.0, "worst_name": "q1"}
    assert compress._summary(rounding(None)) == {"median": None, "worst": None, "worst_name": "q0"}


def test_a_proof_becomes_plain_values():
    @dataclass
    class Proof:
        bound: float

    assert compress._proof_facts(Proof(bound=0.5)) == {"bound": 0.5}
    assert compress._proof_facts({"bound": 0.5}) == {"bound": 0.5}
    assert compress._proof_facts(None) is None
