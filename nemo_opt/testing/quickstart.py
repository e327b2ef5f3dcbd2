"""The main job: a tiny Llama, really trained, is quantised, pruned, distilled and exported at TP2 and PP2; each step is judged by numbers.

Decisions:
- One job of two ranks runs all steps, each at its own layout: the stack is imported once a rank (15 to 25 s), not once a step.
- Every loss is measured on the same validation samples, so that rows can be compared.
- A step whose verdict is bad does not stop the others; one that raises does, since the rest builds on it.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_opt.api.results import DistillResult, EvalResult, PruneResult, PtqResult, Result
from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.launch import rank, run_ranks
from nemo_opt.parallel import Topology
from nemo_opt.testing import fixtures
from nemo_opt.testing.quickstart_report import print_table, write_html

__all__ = ["GOAL_S", "Row", "main", "run_steps"]

GOAL_S = 480
"""Eight minutes on two cores; printed, not asserted."""

FP8_MAX_LOSS = 0.05
"""Nats that FP8 may move the loss of a trained model by; a wrong scale moves it by whole nats."""

EQUAL_NATS = 1e-5
"""Bound between two ways of computing one loss in float32: the same weights at another layout, or in transformers (measured: 5e-8)."""

FP8_EQUAL_NATS = 1e-4
"""The same for a quantised model: an activation that differs in its last bit may round to the neighbouring FP8 value (measured: 3.3e-6)."""

_RESULT = "quickstart.json"
_PAGE = "quickstart.html"
_LOG = "quickstart.log"
_ARTEFACTS = ("teacher-fp8", "teacher-fp8-local", "pruned", "distilled", "distilled-hf")
_RANKS = 2
_BATCHES, _MICRO_BATCH = 8, 8  # 64 samples of 128 tokens: the whole validation part of the corpus
_DISTILL_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step."""

    what: str
    """What was done."""
    layout: str
    """Where: the topology's name."""
    spec: str
    """Layer spec, or transformers."""
    loss_before: float | None
    """Validation loss before (nats a token)."""
    loss_after: float
    """Validation loss after."""
    size: str
    """Parameters or bytes, before and after."""
    time_s: float
    """Seconds."""
    good: bool
    """Whether the step did what it must."""
    verdict: str
    """What was asked, in words and numbers."""


# ---------------------------------------------------------------------------------------------------------------- in the ranks


def run_steps(*, root: str, output: str, steps: int = _DISTILL_STEPS) -> list[Row]:
    """All steps, on every rank of a job of two; returns their rows."""
    from nemo_opt import api

    made = fixtures.Fixtures(Path(root))
    out = {name: str(Path(output) / name) for name in _ARTEFACTS}
    tp2, pp2 = Topology(tp=2), Topology(pp=2)
    data, teacher = _data(made), str(made.teacher)
    log = Path(output) / _LOG

    with _announce(log) as say:
        say("teacher")
        before = api.evaluate(path=teacher, data=data, topology=tp2, eval_batches=_BATCHES)
        rows = [_teacher_row(made, before)]
        say("FP8 at TP2")
        fp8 = api.ptq(checkpoint=teacher, **_ptq(out["teacher-fp8"]), data=data, topology=tp2, eval_batches=_BATCHES)
        rows.append(_ptq_row("teacher, FP8", fp8, before.loss))
        say("FP8 at PP2")
        reloaded = api.evaluate(path=fp8.path, data=data, topology=pp2, eval_batches=_BATCHES)
        rows.append(_reload_row("the same, loaded at another layout", reloaded, fp8.loss_after, FP8_EQUAL_NATS))
        local = api.ptq(checkpoint=teacher, **_ptq(out["teacher-fp8-local"]), data=data, topology=pp2, eval_batches=_BATCHES, spec="local")
        rows.append(_ptq_row("teacher, FP8", local, before.loss))
        say("pruning at PP2")
        pruned = api.prune(checkpoint=teacher, output=out["pruned"], **_prune(), data=data, topology=pp2, eval_batches=_BATCHES)
        rows.append(_prune_row(pruned))
        say("distillation at PP2")
        training = _distill(data, steps)
        distilled = api.distill(student=pruned.path, teacher=teacher, output=out["distilled"], **training, topology=pp2, log_dir=output)
        rows.append(_distill_row(distilled))
        say("export to Hugging Face at TP2")
        export = api.export_ckpt(checkpoint=distilled.path, output=out["distilled-hf"], topology=tp2)
        # Two replicas share the samples that one had above.
        reopened = api.evaluate(path=export.path, data=data, topology=Topology(), eval_batches=_BATCHES // _RANKS)
        rows.append(_export_row(reopened, distilled.loss_after, export.time_s))
    return rows


@contextmanager
def _announce(log: Path) -> Iterator[Callable[[str], None]]:
    """A function that says on rank 0 which step begins; what ModelOpt prints meanwhile (long tables) goes to `log`."""
    start, stdout = time.perf_counter(), sys.stdout

    def say(step: str) -> None:
        if rank() == 0:
            print(f"[{time.perf_counter() - start:5.0f} s] {step}", file=stdout, flush=True)
            print(f"=== {step}")

    with log.open("a") if rank() == 0 else open(os.devnull, "w") as file, redirect_stdout(file):  # noqa: PTH123
        yield say


def _data(made: fixtures.Fixtures, gbs: int = _MICRO_BATCH) -> DataConfig:
    return DataConfig(
        paths=[str(made.dataset)], split=fixtures.RECIPE.split, seq_length=128, micro_batch_size=_MICRO_BATCH, global_batch_size=gbs
    )


def _ptq(output: str) -> dict[str, Any]:
    from nemo_opt.quantize.config import ExportConfig, QuantizationConfig

    return {
        "quantization": QuantizationConfig(
            algorithm="fp8", calibration_dataset="builtin", calibration_dataset_size=64, calibration_batch_size=_MICRO_BATCH
        ),
        "export": ExportConfig(path=output, export_format="nemo"),
    }


def _prune() -> dict[str, Any]:
    from nemo_opt.prune.config import PruningConfig

    pruning = PruningConfig(target_hidden_size=96, target_ffn_hidden_size=192, target_num_layers=2)
    return {"pruning": pruning, "num_train_samples": 64}


def _distill(data: DataConfig, steps: int) -> dict[str, Any]:
    from nemo_opt.distill.config import DistillationConfig
    from nemo_opt.training.config import TrainingConfig

    training = TrainingConfig(
        max_steps=steps,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size // 2,  # two micro-batches, so that both pipeline stages work
        seq_length=data.seq_length,
        lr=2e-3,
        min_lr=2e-4,
        warmup_steps=max(steps // 10, 1),
    )
    halved = DataConfig(**{**asdict(data), "micro_batch_size": training.micro_batch_size})
    # Twice as many batches of half the size: the same validation samples as everywhere.
    return {"data": halved, "training": training, "distillation": DistillationConfig(), "eval_batches": 2 * _BATCHES}


# ---------------------------------------------------------------------------------------------------------------- verdicts


def _row(result: Result, what: str, before: float | None, after: float | None, size: str, good: bool, verdict: str, **more: Any) -> Row:
    assert after is not None
    finite = math.isfinite(after)
    row: dict[str, Any] = {"layout": result.layout, "spec": result.spec, "time_s": result.time_s} | more
    return Row(what=what, loss_before=before, loss_after=after, size=size, good=good and finite, verdict=verdict, **row)


def _count(value: int) -> str:
    return f"{value / 1e6:.3g} M"


def _teacher_row(made: fixtures.Fixtures, result: EvalResult) -> Row:
    facts = made.facts
    uniform = facts["loss_uniform"]
    margin = uniform - result.loss
    verdict = f"{margin:.2f} nats under knowing nothing (>= {fixtures.MARGIN_NATS:g})"
    return _row(
        result,
        f"teacher, {facts['teacher']['steps']} steps",
        uniform,
        result.loss,
        _count(result.parameters),
        margin >= fixtures.MARGIN_NATS,
        verdict,
        time_s=facts["time_s"],
    )


def _ptq_row(what: str, result: PtqResult, teacher_loss: float) -> Row:
    assert result.loss_before is not None
    assert result.loss_after is not None
    moved = abs(result.loss_after - teacher_loss)
    assert result.bytes_after is not None
    # A quantiser that does nothing would leave the loss exactly where it was.
    good = 0 < moved <= FP8_MAX_LOSS and result.quantizers > 0 and abs(result.loss_before - teacher_loss) <= EQUAL_NATS
    return _row(
        result,
        what,
        result.loss_before,
        result.loss_after,
        f"{result.bytes_before / 1e6:.3g} MB -> {result.bytes_after / 1e6:.3g} MB",
        good,
        f"{result.quantizers} quantizers moved the loss by {moved:.4f} (<= {FP8_MAX_LOSS:g}, not 0)",
    )


def _reload_row(what: str, result: EvalResult, expected: float | None, bound: float = EQUAL_NATS) -> Row:
    assert expected is not None
    difference = abs(result.loss - expected)
    return _row(
        result,
        what,
        expected,
        result.loss,
        _count(result.parameters),
        difference <= bound,
        f"equal within {difference:.1e} (<= {bound:g})",
    )


def _prune_row(result: PruneResult) -> Row:
    targets = {"hidden_size": 96, "ffn_hidden_size": 192, "num_layers": 2}
    reached = all(result.model_after[name] == size for name, size in targets.items())
    smaller = result.parameters < result.parameters_before
    size = f"{_count(result.parameters_before)} -> {_count(result.parameters)}"
    verdict = "hidden {hidden_size}, ffn {ffn_hidden_size}, layers {num_layers}".format(**result.model_after)
    return _row(result, "teacher, pruned", result.loss_before, result.loss_after, size, reached and smaller, verdict)


def _distill_row(result: DistillResult) -> Row:
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.teacher_loss is not None
    closed = (result.loss_before - result.loss_after) / (result.loss_before - result.teacher_loss)
    what = f"pruned, distilled {result.steps} steps"
    # Half of the way is what 40 steps reach; a loss that does not fall, or an ignored teacher, stays far below.
    good = closed >= 0.5 and result.kd_loss_last < result.kd_loss_first
    verdict = f"{100 * closed:.0f} % of the way to the teacher's {result.teacher_loss:.4f} (>= 50 %)"
    return _row(result, what, result.loss_before, result.loss_after, _count(result.parameters), good, verdict)


def _export_row(result: EvalResult, expected: float | None, export_time_s: float) -> Row:
    row = _reload_row("exported, opened by transformers", result, expected)
    return Row(**{**asdict(row), "time_s": row.time_s + export_time_s})


# ---------------------------------------------------------------------------------------------------------------- the command


def main(output: Path) -> int:
    """Builds or finds the fixtures, runs the steps on two ranks, and reports; 0 only if every verdict is good."""
    start = time.perf_counter()
    _prepare(output)
    made = fixtures.build()
    rows = run_ranks("nemo_opt.testing.quickstart:run_steps", {"root": str(made.root), "output": str(output)}, devices=_RANKS)
    time_s = time.perf_counter() - start
    record = {
        "rows": [asdict(row) for row in rows],
        "good": bool(rows) and all(row.good for row in rows),
        "time_s": time_s,
        "goal_s": GOAL_S,
        "fixtures": str(made.root),
        "versions": made.facts["versions"],
    }
    (output / _RESULT).write_text(json.dumps(record, indent=1) + "\n")
    write_html(record, output / _PAGE)
    print_table(record, output, page=output / _PAGE, result=output / _RESULT)
    return 0 if record["good"] else 1


def _prepare(output: Path) -> None:
    """An empty directory; what an earlier quickstart left there is replaced."""
    if output.is_dir() and any(output.iterdir()) and not (output / _RESULT).is_file() and not (output / ".quickstart").is_file():
        raise ConfigError(f"output {output} is not empty and holds no earlier quickstart: choose another directory")
    for name in _ARTEFACTS:
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (_RESULT, _PAGE, _LOG, "metrics.jsonl"):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / ".quickstart").touch()
