"""How a result looks on the terminal: what was done, numbers before and after, and where the result lies."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_opt import launch
from nemo_opt.api.results import DistillResult, EvalResult, ExportResult, ImportResult, PruneResult, PtqResult, Result, TrainResult

__all__ = ["format_bytes", "format_count", "format_loss", "show"]

_TITLES = {
    TrainResult: "Trained",
    PtqResult: "Quantised",
    PruneResult: "Pruned",
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


def _rows(result: Result) -> Iterable[tuple[str, str]]:
    """What is particular to each kind of result."""
    match result:
        case TrainResult():
            yield "training loss", _arrow(format_loss(result.loss_first), format_loss(result.loss_last))
            yield "validation loss", f"{format_loss(result.loss_after)} (knowing nothing: {result.loss_uniform:.4f})"
            yield "steps", f"{result.steps}, {format_count(result.tokens_per_s)} tokens/s"
        case PtqResult():
            yield "algorithm", f"{result.algorithm or 'none'}, {result.quantizers} quantizers"
            yield _losses(result)
            yield "bytes", _arrow(format_bytes(result.bytes_before), format_bytes(result.bytes_after))
        case PruneResult():
            yield from _pruning_rows(result)
        case DistillResult():
            yield _losses(result)
            yield "teacher's loss", format_loss(result.teacher_loss)
            yield "distillation loss", _arrow(format_loss(result.kd_loss_first), format_loss(result.kd_loss_last))
            yield "steps", f"{result.steps}, {format_count(result.tokens_per_s)} tokens/s"
        case ImportResult() | ExportResult():
            yield "from", result.source
            yield "bytes", format_bytes(result.bytes_after)
        case EvalResult():
            yield "validation loss", f"{result.loss:.4f} over {result.tokens} tokens"


def show(result: Result) -> None:
    """Prints `result` (rank 0 only, under torchrun)."""
    if launch.rank() != 0:
        return
    table = Table(title=_TITLES.get(type(result), type(result).__name__), title_justify="left", title_style="bold", show_header=False)
    for name, value in _rows(result):
        table.add_row(name, value)
    if not isinstance(result, PruneResult):
        table.add_row("parameters", format_count(result.parameters))
    table.add_row("layout", f"{result.layout}, {result.spec} layer spec, {result.device}")
    table.add_row("time", f"{result.time_s:.1f} s")
    console = Console(soft_wrap=True)
    console.print(table)
    verb = "read" if isinstance(result, EvalResult) else "written to"
    console.print(f"{verb} [bold]{result.path}[/bold]", style="green", highlight=False)
