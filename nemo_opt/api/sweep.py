"""ptq_sweep(): one model quantised by several algorithms, in one start of the ranks, side by side in a table.

Decisions:
- Each algorithm starts from the checkpoint anew, on the same calibration and validation samples; the loss before is measured once.
- Blocks that do not fit the model's sizes at this layout are reduced (`fitting_blocks`), and the result says which were used.
- An algorithm that fails is reported with its error, and the others go on. A failure of one rank alone reaches the others as a timeout.
- `sweep.json` in the output directory holds every number of the page.
"""

import contextlib
import io
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from tqdm import tqdm

from nemo_opt.api import checks
from nemo_opt.api._session import directory_bytes, open_feed, session, world_size
from nemo_opt.api.compress import Source, quantize_and_export
from nemo_opt.api.results import PtqResult, SweepResult, SweepRun
from nemo_opt.checkpoint.info import read_info
from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig
from nemo_opt.errors import NemoOptError
from nemo_opt.models.build import Spec
from nemo_opt.parallel import Topology
from nemo_opt.quantize.blocks import fitting_blocks
from nemo_opt.quantize.config import ALGORITHMS, ExportConfig, QuantizationConfig
from nemo_opt.quantize.quantizer import Quantizer
from nemo_opt.quantize.report import write_sweep_report

__all__ = ["ptq_sweep"]


def ptq_sweep(
    *,
    checkpoint: str,
    output: str,
    topology: Topology,
    data: DataConfig,
    algorithms: Sequence[str] = ALGORITHMS,
    quantization: QuantizationConfig,
    export_format: str | None = "hf",
    tokenizer: str | None = None,
    report: str | None = None,
    eval_batches: int = 8,
    spec: Spec | None = None,
    overwrite: bool = False,
) -> SweepResult:
    """Quantises a checkpoint by each of several algorithms, and compares them. Collective.

    Args:
        checkpoint: The model, unquantised.
        output: Directory to write: `sweep.json`, and each export under the algorithm's name.
        topology: The layout to calibrate at.
        data: The text; `micro_batch_size` is that of the evaluation.
        algorithms: What `QuantizationConfig` takes as algorithm; all of `ALGORITHMS` by default.
        quantization: All other settings.
        export_format: Form of the exports; None measures only.
        tokenizer: Its directory; the checkpoint's own by default.
        report: HTML file to write: the table, and SQNR and amax of every quantizer by algorithm.
        eval_batches: Validation micro-batches for the losses and the SQNR of activations; 0 measures neither.
        spec: Layer spec, "te" or "local"; the device's default when None.
        overwrite: Replace existing outputs.

    Raises:
        NemoOptError: Bad settings, a damaged checkpoint or unsuitable data; not what an algorithm alone fails of.

    """
    settings: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "eval_batches": eval_batches, "overwrite": overwrite}
    settings |= {"algorithms": algorithms, "quantization": quantization, "export_format": export_format, "report": report, "spec": spec}
    checks.check_ptq_sweep(checkpoint=checkpoint, output=output, topology=topology, world_size=world_size(), **settings)
    info = read_info(checkpoint)
    tokenizer_dir = checks.tokenizer_directory(info, tokenizer)
    with session(topology, info.model) as job:
        feed = open_feed(data, tokenizer_dir, train_samples=quantization.calibration_dataset_size, eval_batches=eval_batches)
        source = Source(job=job, checkpoint=checkpoint, tokenizer_dir=tokenizer_dir, feed=feed, spec=spec, overwrite=overwrite)
        loss_before, facts = _before(source)
        runs = {}
        for name, algorithm in _progress({checks.sweep_name(algorithm): algorithm for algorithm in algorithms}):
            config = fitting_blocks(replace(quantization, algorithm=algorithm), info.model, tp=job.topology.tp)
            target = None if export_format is None else ExportConfig(path=Path(output) / name, export_format=export_format)
            runs[name] = _attempt(name, partial(_run, source, config, target, loss_before))
        result = SweepResult(
            **(facts | {"time_s": time.perf_counter() - job.started}),
            path=output,
            checkpoint=checkpoint,
            loss_before=loss_before,
            bytes_before=directory_bytes(checkpoint),
            runs=runs,
        )
        on_first(lambda: _write(result, report))
        return result


def _before(source: Source) -> tuple[float | None, dict[str, Any]]:
    """Validation loss and facts of the unquantised model."""
    chunks = source.restore()
    return source.feed.loss(chunks), source.job.facts(chunks)


def _run(source: Source, config: QuantizationConfig, target: ExportConfig | None, loss_before: float | None) -> PtqResult:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt's list of all quantizers; the page has them
        result = quantize_and_export(source, source.restore(), Quantizer(config, target), loss_before)
    return replace(result, time_s=time.perf_counter() - start)


def _attempt(name: str, action: Callable[[], PtqResult]) -> SweepRun:
    """The result, or the first rank's error; the same on every rank."""
    error, result = None, None
    try:
        result = action()
    except NemoOptError as problem:
        error = str(problem)
    except Exception as problem:  # noqa: BLE001  whatever stops one algorithm must not stop the others
        error = f"{type(problem).__name__}: {problem}"
        print(f"rank {dist.get_rank()}: {name} failed:\n{traceback.format_exc()}", file=sys.stderr)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, error)
    first = next((found for found in everyone if found is not None), None)
    return SweepRun(result=result) if first is None else SweepRun(error=first)


def _progress(names: dict[str, str]) -> Any:
    """(name, algorithm), with a progress bar on rank 0 of a terminal."""
    bar = tqdm(names.items(), unit="algorithm", disable=dist.get_rank() != 0 or not sys.stderr.isatty())
    for name, algorithm in bar:
        bar.set_description(name)
        yield name, algorithm


def _write(result: SweepResult, report: str | None) -> None:
    directory = Path(result.path)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps({"kind": "SweepResult", **result.to_dict()}, indent=1) + "\n")
    if report is not None:
        write_sweep_report(Path(report), result.to_dict())
