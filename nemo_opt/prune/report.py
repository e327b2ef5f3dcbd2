"""The report of a pruning: importance, what was kept, sizes and losses, on one self-contained page.

Each plot answers one question: how steep is importance, and where was it cut. So scores are drawn in descending order, relative to the
largest; a flat curve says that the cut is arbitrary, a cut left of the knee that it hurts. Curves are thinned to `_POINTS`, so that a large
model's page stays small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_opt import pages
from nemo_opt.pages import COLOURS
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.selection import Kept

__all__ = ["Axis", "axes_of", "write_report"]

_POINTS = 160
"""Points of a curve."""
_MARKED = 64
"""Up to so many things each gets a dot; below `_POINTS`, so that none is thinned away."""
_WIDTH = 5.6
"""Inches of a drawing: shrunk to a phone's 358 pixels its text is still readable, and nothing is off the screen."""
_PARTS = {"ffn": "MLP channels", "heads": "Query heads", "groups": "Query groups", "experts": "Experts"}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Scores of one kind of thing, in each of its places (layers), and which of them stayed."""

    name: str
    """What is scored."""
    places: list[str]
    """Where: one name for each row of `scores`."""
    scores: list[list[float]]
    """Of each place, in their own order."""
    kept: list[list[int]]
    """Indices that stayed, for each place, from 0."""

    @property
    def before(self) -> int:
        """How many there were in a place."""
        return len(self.scores[0])

    @property
    def after(self) -> int:
        """How many of them stayed."""
        return len(self.kept[0])

    @property
    def share(self) -> float:
        """Share of all importance that the kept ones have; 1 where all scores are zero."""
        total = sum(map(sum, self.scores))
        return sum(row[i] for row, kept in zip(self.scores, self.kept, strict=True) for i in kept) / total if total else 1.0


def axes_of(scores: ImportanceScores, kept: Kept) -> list[Axis]:
    """All axes of a model, the depth first; those of layers that are gone are left out."""
    numbers = list(kept.layers)
    depth = Axis(name="Layers", places=["model"], scores=[scores.layers.tolist()], kept=[[number - 1 for number in numbers]])
    width = Axis(name="Hidden channels", places=["model"], scores=[scores.hidden.tolist()], kept=[list(kept.hidden)])
    return [depth, width, *(axis for part in _PARTS if (axis := _per_layer(part, scores, kept)) is not None)]


def _per_layer(part: str, scores: ImportanceScores, kept: Kept) -> Axis | None:
    """One place a layer; for the channels of experts, one for each expert."""
    places, rows, indices = [], [], []
    for number, layer in kept.layers.items():
        if number not in getattr(scores, part):
            return None
        values: torch.Tensor = getattr(scores, part)[number]
        stay: Sequence[Sequence[int]] = layer.ffn if part == "ffn" else [getattr(layer, part)]
        for place, (row, one) in enumerate(zip(values.reshape(len(stay), -1).tolist(), stay, strict=True), start=1):
            places.append(f"layer {number}" + (f", expert {place}" if len(stay) > 1 else ""))
            rows.append(row)
            indices.append(list(one))
    return Axis(name=_PARTS[part], places=places, scores=rows, kept=indices)


def write_report(path: Path, result: dict[str, Any], kept: Kept, scores: ImportanceScores | None) -> None:
    """Writes the page, on the rank that calls it.

    Args:
        path: The HTML file; replaced where it exists.
        result: `PruneResult.to_dict()`.
        kept: What stayed.
        scores: Importance that decided it; None where layers were dropped by number.

    """
    axes = [] if scores is None else axes_of(scores, kept)
    before, after = result["model_before"], result["model_after"]
    pages.write_page(
        "pruning.html.j2",
        path,
        result=result,
        sizes=[(name, before[name], after[name]) for name in before if before[name] != after[name]],
        dropped=[number for number in range(1, before["num_layers"] + 1) if number not in kept.layers],
        axes=axes,
        drawings=[_draw_layers(axis) if axis.name == "Layers" else _draw(axis) for axis in axes],
        heads=_heads(kept) if scores is not None and _changed(before, after, "num_attention_heads", "num_query_groups") else [],
    )


def _changed(before: dict[str, Any], after: dict[str, Any], *names: str) -> bool:
    return any(before[name] != after[name] for name in names)


def _heads(kept: Kept) -> list[tuple[int, str, str]]:
    """(layer, groups, heads) that stayed, numbered from 1 as people count."""
    return [
        (number, ", ".join(str(i + 1) for i in layer.groups), ", ".join(str(i + 1) for i in layer.heads))
        for number, layer in kept.layers.items()
    ]


def _draw_layers(axis: Axis) -> str:
    """One bar a layer, in the model's order."""

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        (values,), (kept,) = axis.scores, axis.kept
        numbers = range(1, len(values) + 1)
        stays = [number - 1 in kept for number in numbers]
        plot.bar(numbers, values, color=[COLOURS["main"] if stay else COLOURS["line"] for stay in stays], width=0.7)
        for number, value, stay in zip(numbers, values, stays, strict=True):
            if not stay:
                plot.annotate("dropped", (number, value), ha="center", va="bottom", color=COLOURS["soft"], fontsize=8)
        if len(values) <= 40:
            plot.set_xticks(list(numbers))
        plot.set_xlabel("layer")
        plot.set_ylabel("block influence")

    return pages.plot(draw, title="Importance of each layer", width=_WIDTH, height=2.6)


def _draw(axis: Axis) -> str:
    """Scores of each place in descending order, relative to its largest, and what stayed."""

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        for row, kept in zip(axis.scores, axis.kept, strict=True):
            ranks, values = _thinned(sorted(row, reverse=True))
            plot.plot(ranks, values, color=COLOURS["main"], linewidth=1.2, alpha=_alpha(len(axis.scores)))
            if axis.before <= _MARKED:
                _mark(plot, ranks, values, _stays(row, kept))
        if axis.after < axis.before and all(map(_is_top, axis.scores, axis.kept)):
            plot.axvspan(axis.after + 0.5, axis.before + 0.5, color=COLOURS["line"], alpha=0.35, linewidth=0)
            plot.axvline(axis.after + 0.5, color=COLOURS["bad"], linewidth=1.2)
            place: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "top", "color": COLOURS["bad"]}
            plot.annotate(f"cut at {axis.after} of {axis.before}", (axis.after + 0.5, 1.0), **place)
        plot.set_xlim(0.5, axis.before + 0.5)
        plot.set_ylim(0, 1.05)
        plot.xaxis.get_major_locator().set_params(integer=True)
        marks = "; filled ones stay" if axis.before <= _MARKED else ""
        plot.set_xlabel("most important first" + (", a line a layer" if len(axis.scores) > 1 else "") + marks)
        plot.set_ylabel("importance / largest")

    return pages.plot(draw, title=f"Importance of {axis.name.lower()}", width=_WIDTH, height=2.6)


def _mark(plot: Any, ranks: list[int], values: list[float], stays: list[bool]) -> None:
    """A dot for each: filled where it stays. Heads are chosen in each group for itself, so theirs need not be the first ones."""
    colours = [COLOURS["main"] if stay else COLOURS["back"] for stay in stays]
    plot.scatter(ranks, values, s=22, c=colours, edgecolors=COLOURS["main"], linewidths=1.0, zorder=3)


def _stays(row: list[float], kept: list[int]) -> list[bool]:
    """Whether each stays, the most important first."""
    chosen = set(kept)
    return [index in chosen for index in sorted(range(len(row)), key=lambda index: (-row[index], index not in chosen))]


def _is_top(row: list[float], kept: list[int]) -> bool:
    """Whether no score that is gone is above one that stays."""
    return all(_stays(row, kept)[: len(kept)])


def _alpha(lines: int) -> float:
    return max(0.25, 1.0 - 0.1 * (lines - 1))


def _thinned(values: list[float]) -> tuple[list[int], list[float]]:
    """Ranks from 1 and values relative to the first, at most `_POINTS` of them, both ends included."""
    largest = values[0] or 1.0
    count = min(len(values), _POINTS)
    ranks = sorted({1 + round(i * (len(values) - 1) / max(count - 1, 1)) for i in range(count)})
    return ranks, [values[rank - 1] / largest for rank in ranks]
