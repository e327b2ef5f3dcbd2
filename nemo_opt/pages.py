"""Self-contained HTML pages: one template machinery and one way to plot for all reports; nothing is loaded from elsewhere.

Decisions:
- A plot is one inline SVG whose colours are the page's CSS variables, so the same drawing serves light and dark screens.
- Text stays text (a fifth of the bytes of glyph outlines, and searchable), in the page's font.
- Without matplotlib a page has no plots; whoever needs them asks `can_plot` first.
"""

import html
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "can_plot", "plot", "write_page"]

COLOURS = {name: f"#0{i:x}0{i:x}0{i:x}" for i, name in enumerate(("text", "soft", "line", "back", "main", "good", "bad"), start=1)}
"""Placeholders to draw with, by the name of the CSS variable that replaces them (`--main`)."""

_TEMPLATES = Path(__file__).parent / "templates"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(draw: Callable[[Any], None], *, title: str, width: float = 8.0, height: float = 3.0) -> str:
    """An SVG element that `draw` fills; empty where matplotlib is not installed.

    Args:
        draw: Called with a matplotlib Figure of constrained layout; draws with `COLOURS` only.
        title: What a screen reader says.
        width: In inches of 96 CSS pixels.
        height: The same.

    """
    if not can_plot():
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text, line = COLOURS["text"], COLOURS["line"]
    style: Any = {"axes.edgecolor": line, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text, "text.color": text}
    quiet: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": title,
    }
    with mpl.rc_context({**style, **quiet, "font.size": 9.0}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def _themed(svg: str, title: str) -> str:
    """The bare element with the page's colours and font, named for screen readers."""
    svg = svg[svg.index("<svg") :]
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def write_page(template: str, path: Path, **values: Any) -> None:
    """Writes the page that `template` (a file beside `page.html.j2`) makes of `values`; a value that is missing is an error."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8")
