"""How the quickstart's record looks: a table on the terminal, and one self-contained HTML page for light and dark screens."""

from pathlib import Path
from typing import Any

from nemo_opt import pages
from nemo_opt.pages import COLOURS

__all__ = ["plot", "print_table", "write_html"]


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


def plot(rows: list[dict[str, Any]]) -> str:
    """Losses before and after each step as an SVG element; empty where matplotlib is not installed."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            if row["loss_before"] is not None:
                axes.plot([row["loss_before"], row["loss_after"]], [place, place], color=COLOURS["line"], linewidth=4, zorder=1)
                axes.scatter([row["loss_before"]], [place], color=COLOURS["line"], s=40, zorder=2)
            axes.scatter([row["loss_after"]], [place], color=COLOURS["good" if row["good"] else "bad"], s=55, zorder=3)
        axes.set_yticks(range(len(rows)), [f"{row['what']} ({row['layout']})" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("validation loss (nats a token): before (grey) and after")
        axes.spines["left"].set_visible(False)

    return pages.plot(draw, title="Validation loss before and after each step", height=0.5 * len(rows) + 0.8)


def write_html(record: dict[str, Any], path: Path) -> None:
    """Writes the page: table and plot, no scripts, nothing loaded from elsewhere."""
    rows = [{**row, "losses": _losses(row)} for row in record["rows"]]
    pages.write_page("quickstart.html.j2", path, **{**record, "rows": rows, "drawing": plot(record["rows"])})
