"""The report of a quantisation, or of a sweep over algorithms: losses, sizes, and what each quantizer loses, on one self-contained page.

Each drawing answers one question: where is precision lost (SQNR of each linear over the layers), which activations have outliers (amax),
what an algorithm costs for its bits (change of the loss). A panel is one linear, so that its layers are one line and linears share a scale.
Of experts the worst of a layer is drawn; the table has them all, worst first.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opt import pages
from nemo_opt.pages import COLOURS

__all__ = ["Line", "lines_of", "proof_text", "write_report", "write_sweep_report"]

_WIDTH = 5.6
"""Inches of a drawing: shrunk to a phone's 358 pixels its text is still readable, and nothing is off the screen."""
_COLUMNS = 3
_LEAST_SPAN_DB = 6.0
"""Of an axis: less than one bit is no difference, and must look like none."""
_ROWS_SHOWN = 40
"""Rows of the table of quantizers."""
_NAME = re.compile(r"decoder\.layers\.(\d+)\.(?:.*\.)?(\w+)\.(\w+?)_quantizer$")
_ORDER = ("linear_qkv", "core_attention", "linear_proj", "linear_fc1", "linear_fc2")
_KINDS = {"weight": "weights", "input": "inputs", "k_bmm": "keys", "v_bmm": "values"}
_STYLES: dict[str, Any] = {
    "weights": {"color": COLOURS["main"], "marker": "o", "markersize": 4, "linestyle": "-"},
    "inputs": {"color": COLOURS["text"], "marker": "s", "markersize": 4, "linestyle": ":", "markerfacecolor": COLOURS["back"]},
    "keys": {"color": COLOURS["main"], "marker": "^", "markersize": 4, "linestyle": "-"},
    "values": {"color": COLOURS["text"], "marker": "v", "markersize": 4, "linestyle": ":", "markerfacecolor": COLOURS["back"]},
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kind of quantizer over the layers."""

    part: str
    """What it belongs to, such as linear_fc1."""
    kind: str
    """Of weights, inputs, keys or values."""
    layers: list[int]
    """Numbers of the layers, from 0 as in names."""
    values: list[float]
    """One for each."""


def lines_of(facts: Mapping[str, Mapping[str, float | None]], key: str, choose: Callable[[float, float], float]) -> list[Line]:
    """Values of `key` (sqnr_db or amax) over the layers; quantizers outside of layers, and those without a value, are left out.

    Args:
        facts: of each quantizer by its global name.
        key: which fact.
        choose: which of two values stands for a layer with several (experts).

    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for name, values in facts.items():
        match, value = _NAME.match(name), values.get(key)
        if match is None or value is None or match[3] not in _KINDS:
            continue
        by_layer = found.setdefault((match[2], _KINDS[match[3]]), {})
        layer = int(match[1])
        by_layer[layer] = choose(by_layer[layer], value) if layer in by_layer else value
    order = {part: place for place, part in enumerate(_ORDER)}
    names = sorted(found, key=lambda name: (order.get(name[0], len(order)), name[0], list(_STYLES).index(name[1])))
    return [Line(part=p, kind=k, layers=sorted(found[p, k]), values=[found[p, k][n] for n in sorted(found[p, k])]) for p, k in names]


def proof_text(proof: Mapping[str, Any]) -> str:
    """What a proof has found, each error beside its bound: "logit error 1.2e-06 (bound 1e-05)"."""
    found = []
    for name, value in proof.items():
        bound = proof.get(f"{name.rpartition('_')[0]}_bound")
        if not name.endswith("_bound"):
            limit = "" if bound is None else f" (bound {_short(bound)})"
            found.append(f"{name.replace('_', ' ')} {_short(value)}{limit}")
    return ", ".join(found)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Writes the page of one quantisation, on the rank that calls it.

    Args:
        path: The HTML file; replaced where it exists.
        result: `PtqResult.to_dict()`.

    """
    proof = None if result["proof"] is None else proof_text(result["proof"])
    pages.write_page("ptq.html.j2", path, result=result, proof=proof, details=_details(result))


def write_sweep_report(path: Path, sweep: dict[str, Any]) -> None:
    """Writes the page of a sweep, on the rank that calls it.

    Args:
        path: The HTML file; replaced where it exists.
        sweep: `SweepResult.to_dict()`.

    """
    results = {name: run["result"] for name, run in sweep["runs"].items() if run["result"] is not None}
    pages.write_page(
        "ptq_sweep.html.j2",
        path,
        sweep=sweep,
        changes=_draw_changes(results),
        ratios=_draw_ratios(results),
        details={name: _details(result) for name, result in results.items()},
    )


def _details(result: dict[str, Any]) -> dict[str, Any]:
    """Drawings, and the rows of the table, worst first."""
    facts = result["quantizer_facts"]
    rows = sorted(facts.items(), key=lambda item: (item[1]["sqnr_db"] is None, item[1]["sqnr_db"] or 0.0, item[0]))
    return {
        "sqnr": _draw_panels(lines_of(facts, "sqnr_db", min), "SQNR, dB", title=f"SQNR of {result['algorithm']}"),
        "amax": _draw_panels(lines_of(facts, "amax", max), "largest value", title=f"Amax of {result['algorithm']}", log=True),
        "rows": rows[:_ROWS_SHOWN],
        "hidden": max(len(rows) - _ROWS_SHOWN, 0),
    }


def _draw_panels(lines: list[Line], label: str, *, title: str, log: bool = False) -> str:
    """A panel for each linear, with one scale."""
    parts = list(dict.fromkeys(line.part for line in lines))
    if not parts:
        return ""
    rows = -(-len(parts) // _COLUMNS)
    limits = _limits([value for line in lines for value in line.values], log=log)

    def draw(figure: Any) -> None:
        first = None
        for place, part in enumerate(parts):
            panel = first = figure.add_subplot(rows, min(len(parts), _COLUMNS), place + 1, sharey=first)
            for line in (line for line in lines if line.part == part):
                panel.plot(line.layers, line.values, label=line.kind, linewidth=1.2, **_STYLES[line.kind])
            panel.set_title(part, fontsize=9)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_yscale("log" if log else "linear")
            panel.set_ylim(*limits)
            panel.legend(fontsize=7, loc="upper center", ncols=2, handlelength=1.6, columnspacing=0.8, borderpad=0.1)
            if place % _COLUMNS == 0:
                panel.set_ylabel(label)
            else:
                panel.tick_params(labelleft=False)
            if place + _COLUMNS >= len(parts):
                panel.set_xlabel("layer")

    return pages.plot(draw, title=title, width=_WIDTH, height=0.3 + 1.8 * rows)


def _limits(values: list[float], *, log: bool) -> tuple[float, float]:
    """Of the axis that all panels share, with room for the legend above."""
    low, high = min(values), max(values)
    if log:
        return low / 2, high * 5
    middle, span = (low + high) / 2, max(high - low, _LEAST_SPAN_DB)
    return middle - 0.6 * span, middle + 0.8 * span


def _draw_changes(results: Mapping[str, dict[str, Any]]) -> str:
    """Change of the loss, fewest bits first."""
    changes = {name: r["loss_after"] - r["loss_before"] for name, r in results.items() if r["loss_after"] is not None}
    names = sorted(changes, key=lambda name: (results[name]["bits_per_weight"] or 0.0, name), reverse=True)  # matplotlib counts from below
    if not names:
        return ""

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        plot.barh(names, [changes[name] for name in names], color=COLOURS["main"], height=0.6)
        plot.axvline(0, color=COLOURS["text"], linewidth=0.8)
        for place, name in enumerate(names):
            beside: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": COLOURS["soft"]}
            plot.annotate(f"{changes[name]:+.5f}", (max(changes[name], 0.0), place), **beside)
        plot.margins(x=0.18)
        plot.set_xlabel("change of the validation loss, nats a token; fewest bits first")

    return pages.plot(draw, title="Change of the loss by algorithm", width=_WIDTH, height=0.6 + 0.28 * len(names))


def _draw_ratios(results: Mapping[str, dict[str, Any]]) -> str:
    """Median and worst SQNR of weights and of activations."""
    names = [name for name in reversed(list(results)) if results[name]["sqnr"]]
    if not names:
        return ""

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        for kind, offset, style in (("weights", 0.12, _STYLES["weights"]), ("activations", -0.12, _STYLES["inputs"])):
            found = {place: results[name]["sqnr"].get(kind) for place, name in enumerate(names)}
            places = [place for place, summary in found.items() if summary and None not in (summary["median"], summary["worst"])]
            medians, worst = ([found[place][key] for place in places] for key in ("median", "worst"))
            plot.hlines([place + offset for place in places], worst, medians, color=style["color"], linewidth=1.2)
            plot.plot(medians, [place + offset for place in places], **(style | {"linestyle": ""}), label=f"{kind}, median")
            plot.plot(worst, [place + offset for place in places], "|", color=style["color"], markersize=8, label="worst")
        plot.set_yticks(range(len(names)), names)
        plot.set_xlabel("SQNR, dB")
        plot.legend(fontsize=7, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.0 + 0.6 / len(names)))

    return pages.plot(draw, title="SQNR by algorithm", width=_WIDTH, height=1.0 + 0.3 * len(names))
