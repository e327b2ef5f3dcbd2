"""The report of a distillation: what the student has learnt, how near it came to the teacher, and each step, on one self-contained page.

Each drawing answers one question: does the student approach the teacher (validation loss, the teacher's beside it), which part of the loss
falls (a panel each, since their sizes differ), is the run healthy (norm of the gradient, learning rate, speed). Long runs are drawn as
means of `_POINTS` groups of steps with their range behind, so the page stays small and no spike is lost. What is not a number is left out
of a drawing and counted in a line beside it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from nemo_opt import pages
from nemo_opt.pages import COLOURS

__all__ = ["Series", "gap_closed", "series_of", "write_report"]

_POINTS = 160
"""Points of a line."""
_WIDTH = 5.6
"""Inches of a drawing: shrunk to a phone's 358 pixels its text is still readable, and nothing is off the screen."""
_LOG_RATIO = 30.0
"""A loss that falls by more is drawn on a logarithmic axis."""
_LOSSES = {"logits_loss": "logits", "intermediate_loss": "hidden states", "lm_loss": "labels", "kd_loss": "all, as weighed"}
_PARTS = {"logits_loss": "loss on logits", "intermediate_loss": "loss on hidden states", "lm_loss": "loss on labels"}
_UNKNOWN = "\N{EN DASH}"
_FIRST_LAST = ", first and last step"
_HEALTH = {"grad_norm": "norm of the gradient", "lr": "learning rate", "tokens_per_s": "tokens a second"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One quantity over the steps."""

    name: str
    """As in the log."""
    steps: list[int]
    """Rising; only those with a finite value."""
    values: list[float]
    """One for each."""
    broken: list[int]
    """Steps whose value is NaN or infinite."""


def series_of(history: Iterable[Mapping[str, Any]], name: str) -> Series:
    """The quantity `name` over the steps. Of lines with one step the last counts: a resumed run repeats what came after its checkpoint."""
    found = {int(line["step"]): float(line[name]) for line in history if line.get(name) is not None and "step" in line}
    finite = {step: found[step] for step in sorted(found) if math.isfinite(found[step])}
    return Series(name=name, steps=list(finite), values=list(finite.values()), broken=sorted(found.keys() - finite.keys()))


def gap_closed(result: Mapping[str, Any]) -> float | None:
    """Share of the way from the student's first validation loss to the teacher's; None where one is unknown, or there was no way to go."""
    before, after, teacher = (_number(result.get(name)) for name in ("loss_before", "loss_after", "teacher_loss"))
    if before is None or after is None or teacher is None or before <= teacher:
        return None
    return (before - after) / (before - teacher)


def write_report(path: Path, result: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes the page, on the rank that calls it.

    Args:
        path: The HTML file; replaced where it exists.
        result: `DistillResult.to_dict()`; what is absent or None is not shown.
        history: Lines of metrics.jsonl: a dict for each logged step, and for each validation its step and `validation_loss`.

    """
    losses = _distinct([series_of(history, name) for name in _LOSSES])
    health = [line for name in _HEALTH if (line := series_of(history, name)).values]
    validation = _validation(result, history)
    pages.write_page(
        "distillation.html.j2",
        path,
        title=str(result.get("path") or "a student"),
        about=_about(result),
        verdict=_verdict(result),
        changes=_changes(result),
        facts=_facts(result),
        validation=_draw_validation(validation, _number(result.get("teacher_loss"))),
        losses=_draw_panels(losses, _LOSSES, columns=2, title="Distillation losses"),
        health=_draw_panels(health, _HEALTH, columns=3, title="Health of the run", height=1.5),
        parts=[line.name for line in losses],
        broken=[(line.name, line.broken) for line in (*losses, *health, validation) if line.broken],
    )


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------- words and tables


def _about(result: Mapping[str, Any]) -> str:
    spec, time_s = result.get("spec"), _number(result.get("time_s"))
    where = [result.get("layout"), f"{spec} layer spec" if spec else None, result.get("device")]
    parts = [result.get("path"), ", ".join(str(part) for part in where if part), None if time_s is None else f"{time_s:.1f} s"]
    return " · ".join(str(part) for part in parts if part)


def _verdict(result: Mapping[str, Any]) -> tuple[str, str]:
    """(class, sentence)."""
    before, after, teacher = (_number(result.get(name)) for name in ("loss_before", "loss_after", "teacher_loss"))
    if before is None or after is None:
        return "soft", "No validation loss was measured: what the student is worth is not known."
    moved = f"{abs(before - after):.4f} nats a token"
    if teacher is None:
        return ("good", f"The student improved by {moved}.") if after < before else ("bad", f"The student did not improve: {moved}.")
    closed = gap_closed(result)
    if closed is None:
        return "soft", "The student was no worse than the teacher before: there was no gap to close."
    gap = f"{before - teacher:.4f} nats a token"
    if closed > 0:
        return "good", f"The student closed {100 * closed:.1f} % of its gap to the teacher ({gap})."
    return "bad", f"The student did not come nearer to the teacher: its gap of {gap} changed by {after - before:+.4f}."


def _changes(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of what was measured; without parts that are not learnt from, and a total that is its one part."""
    teacher = _number(result.get("teacher_loss"))
    losses = _ends(result, "loss_before", "loss_after")
    rows = {"validation loss of the student, nats a token": losses}
    if teacher is not None:
        rows["its distance from the teacher's"] = tuple(None if loss is None else loss - teacher for loss in losses)
    total = _ends(result, "kd_loss_first", "kd_loss_last")
    parts = {words: _ends(result, f"{name}_first", f"{name}_last") for name, words in _PARTS.items()}
    parts = {words: ends for words, ends in parts.items() if any(ends)}
    if list(parts.values()) != [total]:
        rows[f"distillation loss{_FIRST_LAST}"] = total
    rows |= {f"{words}{_FIRST_LAST}": ends for words, ends in parts.items()}
    return [(what, *_texts(*ends)) for what, ends in rows.items() if ends != (None, None)]


def _ends(result: Mapping[str, Any], first: str, last: str) -> tuple[float | None, ...]:
    return _number(result.get(first)), _number(result.get(last))


def _texts(before: float | None, after: float | None) -> tuple[str, str, str]:
    change = _UNKNOWN if before is None or after is None else f"{after - before:+.4f}"
    return _UNKNOWN if before is None else f"{before:.4f}", _UNKNOWN if after is None else f"{after:.4f}", change


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, text) of the rest."""
    formats = {
        "teacher": ("teacher", "{}"),
        "teacher_loss": ("validation loss of the teacher", "{:.4f} nats a token"),
        "steps": ("steps", "{:,}"),
        "parameters": ("parameters of the student", "{:,}"),
        "tokens_per_s": ("speed", "{:,.0f} tokens/s over all ranks"),
        "peak_memory_bytes": ("highest memory of a rank", "{:,.1f} MiB"),
    }
    rows = []
    for name, (what, form) in formats.items():
        value = result.get(name) if name == "teacher" else _number(result.get(name))
        if value is not None:
            scaled = value / 2**20 if name == "peak_memory_bytes" else int(value) if name in ("steps", "parameters") else value
            rows.append((what, form.format(scaled)))
    return rows


# ---------------------------------------------------------------------------------------------------------------- drawings


def _distinct(losses: list[Series]) -> list[Series]:
    """Without those that are zero throughout (a part that is not learnt from), and without a total that is its one part."""
    used = [line for line in losses if any(line.values)]
    return [line for i, line in enumerate(used) if not any(line.values == other.values for other in used[:i])]


def _validation(result: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> Series:
    """The student's validation losses, those before the first and after the last step included."""
    lines = [{"step": int(step), "loss": loss} for step, loss in (result.get("validation_losses") or {}).items()]
    lines += [{"step": line["step"], "loss": line["validation_loss"]} for line in history if "validation_loss" in line and "step" in line]
    ends = {result.get("resumed_at") or 0: result.get("loss_before"), result.get("steps"): result.get("loss_after")}
    lines += [{"step": step, "loss": loss} for step, loss in ends.items() if step is not None]
    return series_of(lines, "loss")


def _draw_validation(line: Series, teacher: float | None) -> str:
    if not line.values:
        return ""

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        plot.plot(line.steps, line.values, color=COLOURS["main"], marker="o", markersize=4, linewidth=1.4)
        beside: Any = {"textcoords": "offset points", "fontsize": 8}
        for index, place in ((0, "left"), (-1, "right")):
            label = f"{line.values[index]:.4f}"
            plot.annotate(label, (line.steps[index], line.values[index]), xytext=(0, 6), ha=place, color=COLOURS["main"], **beside)
        if teacher is not None:
            plot.axhline(teacher, color=COLOURS["soft"], linestyle="--", linewidth=1.2)
            plot.annotate(f"teacher {teacher:.4f}", (line.steps[0], teacher), xytext=(0, -10), color=COLOURS["soft"], **beside)
        plot.margins(y=0.18)
        plot.xaxis.get_major_locator().set_params(integer=True)
        plot.set_xlabel("step")
        plot.set_ylabel("nats a token")

    return pages.plot(draw, title="Validation loss of the student", width=_WIDTH, height=2.8)


def _draw_panels(lines: list[Series], names: Mapping[str, str], *, columns: int, title: str, height: float = 2.0) -> str:
    """A panel for each quantity, over the same steps."""
    if not lines:
        return ""
    columns = min(columns, len(lines))
    rows = -(-len(lines) // columns)

    def draw(figure: Any) -> None:
        first = None
        for place, line in enumerate(lines, start=1):
            panel = first = figure.add_subplot(rows, columns, place, sharex=first)
            steps, means, low, high = _grouped(line)
            if len(steps) < len(line.steps):
                panel.fill_between(steps, low, high, color=COLOURS["line"], linewidth=0)
            panel.plot(steps, means, color=COLOURS["main"], linewidth=1.2, marker="o" if len(steps) == 1 else None, markersize=4)
            panel.set_yscale("log" if min(low) > 0 and max(high) > _LOG_RATIO * min(low) and line.name in _LOSSES else "linear")
            panel.set_title(names[line.name], fontsize=9)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if place > len(lines) - columns:
                panel.set_xlabel("step")

    return pages.plot(draw, title=title, width=_WIDTH, height=0.2 + height * rows)


def _grouped(line: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean step, mean, least and largest value of at most `_POINTS` groups of neighbouring steps."""
    size = -(-len(line.steps) // _POINTS)
    steps = [sum(group) / len(group) for group in batched(line.steps, size)]
    groups = list(batched(line.values, size))
    return steps, [sum(group) / len(group) for group in groups], [min(group) for group in groups], [max(group) for group in groups]
