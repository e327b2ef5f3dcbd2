"""How a result looks on the terminal: what was done, numbers before and after, and where the result lies."""

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_opt import launch
from nemo_opt.api.results import (
    DistillResult,
    EvalResult,
    ExportResult,
    ImportResult,
    PruneResult,
    PtqResult,
    RecipeResult,
    Result,
    SweepResult,
    TrainResult,
)
from nemo_opt.quantize.report import proof_text

__all__ = ["format_bytes", "format_count", "format_db", "format_loss", "show"]

_SWEEP_COLUMNS = ("algorithm", "block", "loss", "change", "bits", "on disk", "weights, dB", "activations, dB", "proven", "time")
_WIDEST = 160

_TITLES = {
    TrainResult: "Trained",
    PtqResult: "Quantised",
    PruneResult: "Pruned",
    RecipeResult: "Recipe searched",
    DistillResult: "Distilled",
    ImportResult: "Imported",
    ExportResult: "Exported",
    EvalResult: "Evaluated",
}


def format_loss(value: float | None) -> str:
    """Four digits after the point; a dash for a loss that was not measured."""
    return "-" if value is None else f"{value:.4f}"


def format_count(value: float) -> str:
    """1,234,567 as 1.23 M."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """1,234,567 as 1.23 MB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g} B"


def format_db(value: float | None) -> str:
    """One digit; "exact" where nothing is lost."""
    return "exact" if value is None else f"{value:.1f} dB"


def _bare_db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _arrow(before: str, after: str) -> str:
    return f"{before} -> {after}"


def _losses(result: Any) -> tuple[str, str]:
    return "validation loss", _arrow(format_loss(result.loss_before), format_loss(result.loss_after))


def _pruning_rows(result: PruneResult) -> Iterable[tuple[str, str]]:
    yield _losses(result)
    yield "parameters", _arrow(format_count(result.parameters_before), format_count(result.parameters))
    for name, after in result.model_after.items():
        if (before := result.model_before.get(name)) != after and name != "kv_channels":  # None or a number, but always the same
            yield name, _arrow(str(before), str(after))
    numbers = range(1, result.model_before.get("num_layers", 0) + 1)
    if result.kept_layers and (gone := [str(number) for number in numbers if number not in result.kept_layers]):
        yield "layers dropped", ", ".join(gone)
    if result.importance_tokens is not None:
        yield "importance", f"measured on {result.importance_tokens:,} tokens"
    if result.search is not None:
        yield "search", f"best of {len(result.search['scored'])} scored, {result.search['fitting']} within the limits"


def _quantisation_rows(result: PtqResult) -> Iterable[tuple[str, str]]:
    blocks = f", blocks of {result.block}" if result.block else ""
    yield "algorithm", f"{result.algorithm or 'none'}, {result.quantizers} quantizers{blocks}"
    yield _losses(result)
    if result.bits_per_weight is not None:
        yield "bits", f"{result.bits_per_weight:.3f} a quantised weight, {result.bits_per_parameter:.2f} a parameter"
    if result.calibration is not None:
        seen = result.calibration
        yield "calibration", f"{seen['samples']} samples, {seen['tokens']:,} tokens, {format_count(seen['tokens_per_s'])} tokens/s"
    for kind, found in result.sqnr.items():
        yield f"SQNR of {kind}", f"median {format_db(found['median'])}, worst {format_db(found['worst'])}: {found['worst_name']}"
    if result.bytes_after is not None:
        yield "bytes", _arrow(format_bytes(result.bytes_before), format_bytes(result.bytes_after))
    if result.proof is not None:
        yield "export proven", proof_text(result.proof)
    for prompt, text in result.samples.items():
        yield "sample", f"{prompt}[bold]{escape(text)}[/bold]"


def _sweep_table(result: SweepResult) -> Table:
    """One row for each algorithm."""
    title = f"Quantised by {len(result.runs)} algorithms, {result.layout}, {result.spec} layer spec, {result.device}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in _SWEEP_COLUMNS:
        table.add_column(name, justify="left" if name in ("algorithm", "block", "proven") else "right")
    before, size = format_loss(result.loss_before), format_bytes(result.bytes_before)
    table.add_row("unquantised", "", before, "", "16", size)
    for name, run in result.runs.items():
        cells = _sweep_cells(run.result) if run.result is not None else ["[red]failed[/red]"]
        table.add_row(name, *cells)
    return table


def _sweep_cells(result: PtqResult) -> list[str]:
    losses = result.loss_before, result.loss_after
    ratios = [result.sqnr.get(kind, {}) for kind in ("weights", "activations")]
    return [
        result.block,
        format_loss(result.loss_after),
        f"{losses[1] - losses[0]:+.5f}" if losses[0] is not None and losses[1] is not None else "-",
        "-" if result.bits_per_weight is None else f"{result.bits_per_weight:.3f}",
        "-" if result.bytes_after is None else format_bytes(result.bytes_after),
        *(" / ".join(_bare_db(found.get(key)) for key in ("median", "worst")) for found in ratios),
        "-" if result.proof is None else "yes",
        f"{result.time_s:.1f} s",
    ]


def _show_sweep(console: Console, result: SweepResult) -> None:
    table = _sweep_table(result)
    # cut to the width of a narrow terminal, all its numbers would be unreadable
    console.width = max(console.width, console.measure(table, options=console.options.update(width=_WIDEST)).maximum)
    console.print(table)
    for name in result.failed:
        console.print(f"{name} failed: {result.runs[name].error}", style="red", markup=False, highlight=False)


def _run_rows(result: TrainResult | DistillResult) -> Iterable[tuple[str, str]]:
    """What every training took, and how it goes on."""
    resumed = f" ({result.resumed_at} of them before)" if isinstance(result, DistillResult) and result.resumed_at else ""
    yield "steps", f"{result.steps}{resumed}, {format_count(result.tokens_per_s)} tokens/s"
    if result.peak_memory_bytes is not None:
        yield "memory", f"{format_bytes(result.peak_memory_bytes)} at most on a rank"
    if result.resumable is not None:
        yield "can be resumed", "yes"


def _rows(result: Result) -> Iterable[tuple[str, str]]:
    """What is particular to each kind of result."""
    match result:
        case TrainResult():
            yield "training loss", _arrow(format_loss(result.loss_first), format_loss(result.loss_last))
            yield "validation loss", f"{format_loss(result.loss_after)} (knowing nothing: {result.loss_uniform:.4f})"
            yield from _run_rows(result)
        case PtqResult():
            yield from _quantisation_rows(result)
        case RecipeResult():
            yield "bits a weight", f"{result.effective_bits:.2f}, {result.budget_bits:g} allowed"
            yield "linears", ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
        case PruneResult():
            yield from _pruning_rows(result)
        case DistillResult():
            yield _losses(result)
            yield "teacher's loss", format_loss(result.teacher_loss)
            yield "distillation loss", _arrow(format_loss(result.kd_loss_first), format_loss(result.kd_loss_last))
            for name, first, last in (
                ("logits", result.logits_loss_first, result.logits_loss_last),
                ("hidden states", result.intermediate_loss_first, result.intermediate_loss_last),
                ("labels", result.lm_loss_first, result.lm_loss_last),
            ):
                if first or last:
                    yield f"of {name}", _arrow(format_loss(first), format_loss(last))
            yield from _run_rows(result)
        case ImportResult() | ExportResult():
            yield "from", result.source
            yield "bytes", format_bytes(result.bytes_after)
        case EvalResult():
            yield "validation loss", f"{result.loss:.4f} over {result.tokens} tokens"
            if result.bits_per_weight is not None:
                yield "linears", ", ".join(f"{count} {name}" for name, count in result.formats.items())
                yield "bits", f"{result.bits_per_weight:.3f} a quantised weight, {result.bits_per_parameter:.2f} a parameter"
            if result.bytes is not None:
                yield "bytes", format_bytes(result.bytes)


def show(result: Result) -> None:
    """Prints `result` (rank 0 only, under torchrun)."""
    if launch.rank() != 0:
        return
    console = Console(soft_wrap=True)
    if isinstance(result, SweepResult):
        _show_sweep(console, result)
    else:
        console.print(_facts_table(result))
    verb = "read" if isinstance(result, EvalResult) else "written to"
    console.print(f"{verb} [bold]{result.path}[/bold]", style="green", highlight=False)


def _facts_table(result: Result) -> Table:
    table = Table(title=_TITLES.get(type(result), type(result).__name__), title_justify="left", title_style="bold", show_header=False)
    for name, value in _rows(result):
        table.add_row(name, value)
    if not isinstance(result, PruneResult):
        table.add_row("parameters", format_count(result.parameters))
    table.add_row("layout", f"{result.layout}, {result.spec} layer spec, {result.device}")
    table.add_row("time", f"{result.time_s:.1f} s")
    return table
