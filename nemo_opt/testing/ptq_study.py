"""What each algorithm costs a tiny Llama: change of the loss and SQNR, over models that were trained from different seeds.

Each seed trains the fixtures' teacher anew (other weights, another order of the data), and quantises it by every algorithm on one rank.
`python -m nemo_opt.testing.ptq_study --bounds nemo_opt/testing/ptq_bounds.json` prints the table and writes the bounds that the functional
sweeps (tests/functional/L2_PTQ_Sweep_*.sh) compare the fixtures' own teacher with; docs/quantization.md records them.

A bound is Student's prediction interval: where one more model of the same kind lies in 99.9 % of all cases. It has two sides: a change of
the loss that is too small, or an SQNR that is too good, means that something was not quantised. The loss of so small a model moves by a few
thousandths even at four bits, in either direction, so it is the SQNR that tells formats apart.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from nemo_opt.launch import run_ranks
from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig
from nemo_opt.testing import fixtures

__all__ = ["BOUNDS", "CALIBRATION", "EVAL_BATCHES", "QUANTITIES", "SPLIT", "Bound", "bounds_of", "main", "study"]

CALIBRATION = QuantizationConfig(
    awq_block_size=64, calibration_dataset="builtin", calibration_dataset_size=64, calibration_batch_size=8, calibration_seq_len=128
)
"""Blocks of 64 fit the tiny Llama at tensor parallel sizes 1 and 2."""
EVAL_BATCHES, SPLIT = 8, fixtures.RECIPE.split
BOUNDS = Path(__file__).with_name("ptq_bounds.json")
"""What the study has written."""
QUANTITIES = ("loss_change", "weights_db", "activations_db")
"""Nats a token; medians of SQNR in decibels."""
_CONFIDENCE = 0.999


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Where one more model is expected."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    values: list[float]
    """What it was made from, seed by seed."""


def study(*, root: str, folder: str, seeds: int, steps: int, algorithms: list[str]) -> dict[str, dict[str, list[float]]]:
    """Algorithm -> quantity -> value for each seed; called on one rank.

    Args:
        root: Directory of fixtures.
        folder: For what is trained; removed by the caller.
        seeds: How many models.
        steps: Optimizer steps of each.
        algorithms: What is measured.

    """
    from nemo_opt.api import ptq_sweep
    from nemo_opt.parallel import Topology

    found: dict[str, dict[str, list[float]]] = {name: {quantity: [] for quantity in QUANTITIES} for name in algorithms}
    for seed in range(1, seeds + 1):
        model = _train(fixtures.Fixtures(Path(root)), Path(folder) / str(seed), seed, steps)
        sweep = ptq_sweep(
            checkpoint=model,
            output=f"{folder}/sweep{seed}",
            algorithms=algorithms,
            quantization=CALIBRATION,
            export_format=None,
            topology=Topology(),
            data=_data(fixtures.Fixtures(Path(root)), folder, seed),
            eval_batches=EVAL_BATCHES,
        )
        for name, run in sweep.runs.items():
            assert run.result is not None, f"{name}: {run.error}"
            for quantity, value in _quantities(run.result).items():
                found[name][quantity].append(value)
    return found


def _data(made: fixtures.Fixtures, folder: str, seed: int) -> Any:
    from nemo_opt.data.config import DataConfig

    size = fixtures.RECIPE.global_batch_size
    return DataConfig(
        paths=[str(made.dataset)],
        split=SPLIT,
        seq_length=fixtures.RECIPE.seq_length,
        micro_batch_size=size,
        global_batch_size=size,
        index_mapping_dir=f"{folder}/indices",
        seed=seed,
    )


def _train(made: fixtures.Fixtures, output: Path, seed: int, steps: int) -> str:
    from nemo_opt.api import train
    from nemo_opt.parallel import Topology
    from nemo_opt.training.config import TrainingConfig

    recipe = fixtures.RECIPE
    data = _data(made, str(output.parent), seed)
    training = TrainingConfig(
        max_steps=steps,
        lr=recipe.lr,
        min_lr=recipe.lr / 10,
        warmup_steps=steps // 10,
        seq_length=data.seq_length,
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        limit_val_batches=EVAL_BATCHES,
        seed=seed,
    )
    result = train(
        output=str(output),
        model=recipe.teacher,
        tokenizer=str(made.tokenizer),
        data=data,
        training=training,
        topology=Topology(),
        save_optimizer=False,
    )
    print(f"seed {seed}: validation loss {result.loss_after:.4f} after {steps} steps", flush=True)
    return str(output)


def _quantities(result: Any) -> dict[str, float]:
    medians = {f"{kind}_db": result.sqnr[kind]["median"] for kind in ("weights", "activations") if kind in result.sqnr}
    return {"loss_change": result.loss_after - result.loss_before, **medians}


def bounds_of(values: Sequence[float], *, confidence: float = _CONFIDENCE) -> Bound:
    """Student's prediction interval for one more value.

    Args:
        values: at least two, taken to be normal.
        confidence: share of further values within.

    """
    from scipy.stats import t

    reach = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) * math.sqrt(1 + 1 / len(values))
    return Bound(low=mean(values) - reach, high=mean(values) + reach, values=list(values))


def _show(found: dict[str, dict[str, list[float]]]) -> None:
    print(f"| algorithm | {' | '.join(QUANTITIES)} |")
    print("|---|" + "---|" * len(QUANTITIES))
    for name, quantities in found.items():
        cells = []
        for quantity, values in quantities.items():
            cells.append(_cell(values, 5 if quantity == "loss_change" else 2) if values else "")
        print(f"| {name} | {' | '.join(cells)} |")


def _cell(values: list[float], digits: int) -> str:
    bound = bounds_of(values)
    return f"{mean(values):+.{digits}f} (bound {bound.low:+.{digits}f} .. {bound.high:+.{digits}f})"


def _write(path: Path, found: dict[str, dict[str, list[float]]], seeds: int, steps: int) -> None:
    origin = {
        "made_by": "python -m nemo_opt.testing.ptq_study",
        "seeds": seeds,
        "steps": steps,
        "confidence": _CONFIDENCE,
        "versions": fixtures.find().facts["versions"],
        "layout": "TP1PP1",
    }
    bounds = {name: {quantity: asdict(bounds_of(values)) for quantity, values in found[name].items() if values} for name in found}
    path.write_text(json.dumps({"origin": origin, **bounds}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the study on one rank, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.ptq_study", description="What each algorithm costs, over seeds of training")
    parser.add_argument("--seeds", type=int, default=5, help="Models that are trained; at least 2")
    parser.add_argument("--steps", type=int, default=fixtures.RECIPE.teacher_steps, help="Optimizer steps of each; 240 take a minute")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--bounds", type=Path, help="Write the bounds to this file")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds} must be at least 2: a spread needs two values")
    with tempfile.TemporaryDirectory(prefix="nemo_opt_ptq_study_") as folder:
        settings = {"root": str(fixtures.build().root), "folder": folder, "seeds": options.seeds, "steps": options.steps}
        found = run_ranks("nemo_opt.testing.ptq_study:study", settings | {"algorithms": options.algorithms}, devices=1)
    _show(found)
    if options.bounds:
        _write(options.bounds, found, options.seeds, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
