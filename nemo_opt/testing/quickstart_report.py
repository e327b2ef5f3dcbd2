"""How the quickstart's record looks: a table on the terminal, and one self-contained HTML page for light and dark screens."""

import importlib.util
import io
from pathlib import Path
from typing import Any

__all__ = ["plot", "print_table", "write_html"]

_TEMPLATE = "quickstart.html.j2"
_COLOURS = {"light": ("#1f2328", "#c8d1dc", "#2f7d4f", "#b3372f"), "dark": ("#e6edf3", "#4b5663", "#5fc98a", "#f0857c")}
"""Text and axes, loss before, loss after of a good step, of a bad one."""


def _losses(row: dict[str, Any]) -> str:
    before = "" if row["loss_before"] is None else f"{row['loss_before']:.4f} -> "
    return f"{before}{row['loss_after']:.4f}"


def print_table(record: dict[str, Any], output: Path, *, page: Path, result: Path) -> None:
    """One row a step, then where everything lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="nemo_opt quickstart", title_justify="left", title_style="bold")
    for title in ("what", "layout", "spec", "validation loss", "size", "time", "verdict"):
        table.add_column(title, overflow="fold")
    for row in record["rows"]:
        mark = "[green]ok[/]" if row["good"] else "[red]BAD[/]"
        table.add_row(
            row["what"], row["layout"], row["spec"], _losses(row), row["size"], f"{row['time_s']:.1f} s", f"{mark} {row['verdict']}"
        )
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    colour = "green" if record["good"] else "red"
    console.print(f"{len(record['rows'])} steps in {record['time_s']:.0f} s (goal: {record['goal_s']} s)", style=colour, highlight=False)
    for name, path in (("artefacts", output), ("report", page), ("numbers", result)):
        console.print(f"{name:<9} {path.absolute()}", soft_wrap=True, highlight=False)


def plot(rows: list[dict[str, Any]], theme: str) -> str:
    """Losses before and after each step as an SVG element; empty where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure

    text, before_colour, good, bad = _COLOURS[theme]
    figure = Figure(figsize=(8, 0.5 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if row["loss_before"] is not None:
            axes.plot([row["loss_before"], row["loss_after"]], [place, place], color=before_colour, linewidth=4, zorder=1)
            axes.scatter([row["loss_before"]], [place], color=before_colour, s=40, zorder=2)
        axes.scatter([row["loss_after"]], [place], color=good if row["good"] else bad, s=55, zorder=3)
    axes.set_yticks(range(len(rows)), [f"{row['what']} ({row['layout']})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats a token): before (grey) and after")
    axes.tick_params(colors=text)
    axes.xaxis.label.set_color(text)
    for side, spine in axes.spines.items():
        spine.set_color(text)
        spine.set_visible(side == "bottom")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def write_html(record: dict[str, Any], path: Path) -> None:
    """Writes the page: table and plot, no scripts, nothing loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plots = {theme: plot(record["rows"], theme) for theme in _COLOURS}
    rows = [{**row, "losses": _losses(row)} for row in record["rows"]]
    path.write_text(environment.get_template(_TEMPLATE).render({**record, "rows": rows, "plots": plots}), encoding="utf-8")
