"""The report of a distillation: what its sentence, tables and drawings say, read back from matplotlib's artists and from the page."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from nemo_opt import pages
from nemo_opt.distill.report import Series, _grouped, gap_closed, series_of, write_report

NAN, DASH = float("nan"), "\N{EN DASH}"
RESULT = {
    "path": "OUT/<a>", "steps": 4, "teacher": "/models/teacher", "teacher_loss": 5.0, "loss_before": 5.5, "loss_after": 5.125,
    "kd_loss_first": 0.75, "kd_loss_last": 0.25, "logits_loss_first": 0.5, "logits_loss_last": 0.125, "intermediate_loss_first": 0.25,
    "intermediate_loss_last": 0.2, "validation_losses": {"2": 5.25}, "tokens_per_s": 4012.25, "peak_memory_bytes": 3 * 2**20,
    "layout": "TP1PP2", "spec": "te", "device": "cpu/gloo", "parameters": 412345, "time_s": 33.25,
}  # fmt: skip
HISTORY = [
    {"step": n, "kd_loss": 2 / n, "logits_loss": 1 / n, "intermediate_loss": 0.5 / n, "grad_norm": 1.0 * n, "lr": 1e-3, "tokens_per_s": 4e3}
    for n in (1, 2, 3, 4)
] + [{"step": 2, "validation_loss": 5.25}, {"step": 3, "validation_loss": 5.2}]
ONLY_LOGITS = [line | {"kd_loss": line["logits_loss"], "intermediate_loss": 0.0} for line in HISTORY[:4]]


def drawn(result, history):
    """What is put on the page: values of the template, and the axes of each drawing by its title."""
    axes = {}

    def plot(draw, *, title, **_):
        figure = Figure()
        draw(figure)
        axes[title] = figure.axes
        return f"<svg>{title}</svg>"

    with patch("nemo_opt.pages.plot", plot), patch("nemo_opt.pages.write_page") as page:
        write_report("page", result, history)
    assert page.call_args.args == ("distillation.html.j2", "page")
    return SimpleNamespace(axes=axes, **page.call_args.kwargs)


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


# ---------------------------------------------------------------------------------------------------------------- numbers


def test_a_series_is_sorted_finite_and_of_the_last_run():
    lines = [{"step": 2, "a": 2.0}, {"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}, {"step": 3, "a": NAN}, {"step": 4, "a": math.inf}]
    lines += [{"step": 5, "b": 1.0}, {"step": 6, "a": None}, {"a": 9.0}]
    assert series_of(lines, "a") == Series(name="a", steps=[1, 2], values=[1.0, 3.0], broken=[3, 4])


@pytest.mark.parametrize(
    ("before", "after", "teacher", "share"),
    [
        (5.5, 5.125, 5.0, 0.75),
        (5.5, 5.0, 5.0, 1.0),
        (5.5, 4.75, 5.0, 1.5),
        (5.5, 5.75, 5.0, -0.5),
        (5.0, 4.9, 5.0, None),
        (4.5, 4.4, 5.0, None),
        (None, 5.0, 5.0, None),
        (5.5, NAN, 5.0, None),
        (5.5, 5.0, None, None),
    ],
)
def test_share_of_the_gap(before, after, teacher, share):
    assert gap_closed({"loss_before": before, "loss_after": after, "teacher_loss": teacher}) == share


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=700))
def test_groups_hold_every_step_once_and_their_range(values):
    line = Series(name="a", steps=list(range(1, len(values) + 1)), values=values, broken=[])
    steps, means, low, high = _grouped(line)
    assert len(steps) <= 160
    assert (min(low), max(high)) == (min(values), max(values)), "no spike is lost"
    assert all(bottom - 1e-9 <= mean <= top + 1e-9 for bottom, mean, top in zip(low, means, high, strict=True))
    assert all(a < b for a, b in pairwise(steps))
    if len(values) <= 160:
        assert (steps, means, low, high) == (line.steps, values, values, values)


# ---------------------------------------------------------------------------------------------------------------- words and tables


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, "good", "closed 75.0 % of its gap to the teacher (0.5000 nats a token)"),
        ({"loss_after": 5.75}, "bad", "did not come nearer to the teacher: its gap of 0.5000 nats a token changed by +0.2500"),
        ({"loss_after": 5.5}, "bad", "did not come nearer"),
        ({"loss_before": 5.0}, "soft", "no worse than the teacher before"),
        ({"teacher_loss": None}, "good", "improved by 0.3750 nats a token"),
        ({"teacher_loss": None, "loss_after": 5.75}, "bad", "did not improve"),
        ({"loss_after": None}, "soft", "No validation loss was measured"),
        ({"loss_before": NAN}, "soft", "No validation loss was measured"),
    ],
)
def test_verdict(changes, kind, words):
    found, sentence = drawn(RESULT | changes, []).verdict
    assert found == kind
    assert words in sentence


def test_changes():
    assert drawn(RESULT, []).changes == [
        ("validation loss of the student, nats a token", "5.5000", "5.1250", "-0.3750"),
        ("its distance from the teacher's", "0.5000", "0.1250", "-0.3750"),
        ("distillation loss, first and last step", "0.7500", "0.2500", "-0.5000"),
        ("loss on logits, first and last step", "0.5000", "0.1250", "-0.3750"),
        ("loss on hidden states, first and last step", "0.2500", "0.2000", "-0.0500"),
    ]
    alone = {"kd_loss_first": 0.5, "kd_loss_last": 0.125, "intermediate_loss_first": 0.0, "intermediate_loss_last": 0.0}
    assert [row[0] for row in drawn(RESULT | alone, []).changes][2:] == ["loss on logits, first and last step"]
    partly = {"loss_before": None, "teacher_loss": 5.0, "loss_after": 5.25, "kd_loss_first": 1.0}
    assert drawn(partly, []).changes == [
        ("validation loss of the student, nats a token", DASH, "5.2500", DASH),
        ("its distance from the teacher's", DASH, "0.2500", DASH),
        ("distillation loss, first and last step", "1.0000", DASH, DASH),
    ]


def test_facts():
    assert drawn(RESULT, []).facts == [
        ("teacher", "/models/teacher"),
        ("validation loss of the teacher", "5.0000 nats a token"),
        ("steps", "4"),
        ("parameters of the student", "412,345"),
        ("speed", "4,012 tokens/s over all ranks"),
        ("highest memory of a rank", "3.0 MiB"),
    ]
    assert drawn({"steps": 4, "peak_memory_bytes": None, "tokens_per_s": NAN}, []).facts == [("steps", "4")]


# ---------------------------------------------------------------------------------------------------------------- drawings


def test_validation_is_drawn_from_before_the_first_step_with_the_teacher_beside_it():
    (plot,) = drawn(RESULT, HISTORY).axes["Validation loss of the student"]
    student, teacher = plot.lines
    assert points(student) == [(0, 5.5), (2, 5.25), (3, 5.2), (4, 5.125)]
    assert set(teacher.get_ydata()) == {5.0}
    assert [text.get_text() for text in plot.texts] == ["5.5000", "5.1250", "teacher 5.0000"]
    (plot,) = drawn(RESULT | {"resumed_at": 1}, HISTORY).axes["Validation loss of the student"]
    assert points(plot.lines[0]) == [(1, 5.5), (2, 5.25), (3, 5.2), (4, 5.125)], "a resumed run was measured where it went on"
    (plot,) = drawn(RESULT | {"teacher_loss": None}, []).axes["Validation loss of the student"]
    assert [points(line) for line in plot.lines] == [[(0, 5.5), (2, 5.25), (4, 5.125)]]


def test_each_part_of_the_loss_has_a_panel():
    page = drawn(RESULT, HISTORY)
    logits, hidden, total = page.axes["Distillation losses"]
    assert [panel.get_title() for panel in (logits, hidden, total)] == ["logits", "hidden states", "all, as weighed"]
    assert points(logits.lines[0]) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert points(total.lines[0])[0] == (1, 2.0)
    assert not logits.collections, "no range behind single steps"
    assert page.parts == ["logits_loss", "intermediate_loss", "kd_loss"]
    with_labels = drawn(RESULT, [line | {"lm_loss": 5.0} for line in HISTORY[:4]])
    assert with_labels.parts == ["logits_loss", "intermediate_loss", "lm_loss", "kd_loss"]


def test_a_total_that_is_its_one_part_is_drawn_once():
    page = drawn(RESULT, ONLY_LOGITS)
    assert [panel.get_title() for panel in page.axes["Distillation losses"]] == ["logits"]
    own_losses = [{"step": 1, "kd_loss": 1.0}]
    assert drawn(RESULT, own_losses).parts == ["kd_loss"]


@pytest.mark.parametrize(("last", "scale"), [(0.05, "linear"), (0.03, "log"), (0.0, "linear")])
def test_a_loss_that_falls_far_is_drawn_logarithmically(last, scale):
    (panel,) = drawn(RESULT, [{"step": 1, "logits_loss": 1.0}, {"step": 2, "logits_loss": last}]).axes["Distillation losses"]
    assert panel.get_yscale() == scale


def test_many_steps_are_drawn_as_means_with_their_range():
    history = [{"step": n, "logits_loss": 9.0 if n == 500 else 1.0} for n in range(1, 1001)]
    (panel,) = drawn(RESULT, history).axes["Distillation losses"]
    assert len(panel.lines[0].get_xdata()) == 143
    (band,) = panel.collections
    assert band.get_paths()[0].get_extents().ymax == 9.0


def test_health():
    norm, rate, speed = drawn(RESULT, HISTORY).axes["Health of the run"]
    assert [panel.get_title() for panel in (norm, rate, speed)] == ["norm of the gradient", "learning rate", "tokens a second"]
    assert points(norm.lines[0]) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert drawn(RESULT, ONLY_LOGITS[:1]).axes["Health of the run"][0].lines[0].get_marker() == "o", "one step is seen"


def test_what_is_not_finite_is_left_out_and_said():
    history = [*HISTORY, {"step": 5, "logits_loss": NAN, "grad_norm": math.inf, "lr": 1e-3}]
    page = drawn(RESULT | {"validation_losses": {2: NAN}}, [line for line in history if "validation_loss" not in line])
    assert page.broken == [("logits_loss", [5]), ("grad_norm", [5]), ("loss", [2])]
    assert points(page.axes["Distillation losses"][0].lines[0])[-1] == (4, 0.25)


# ---------------------------------------------------------------------------------------------------------------- the page


def text_of(path):
    plain = path.read_text().replace("\N{EN DASH}", "-")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", plain)))


def test_a_whole_page(tmp_path):
    write_report(tmp_path / "page.html", RESULT, [*HISTORY, {"step": 5, "logits_loss": NAN}])
    source, text = (tmp_path / "page.html").read_text(), text_of(tmp_path / "page.html")
    assert source.count("<svg") == 3
    assert not re.findall(r"<script|<link|(?:src|href)=\"(?!#)", source), "nothing is loaded from elsewhere"
    for part in (
        "OUT/&lt;a&gt; · TP1PP2, te layer spec, cpu/gloo · 33.2 s",
        "The student closed 75.0 % of its gap to the teacher",
        "5.5000 5.1250 -0.3750",
        "teacher /models/teacher",
        "logits_loss is not a finite number at 1 step, first at step 5",
        "the sum follows one of them",
    ):
        assert part in text


def test_the_sum_is_explained_only_where_there_are_parts(tmp_path):
    write_report(tmp_path / "page.html", RESULT, ONLY_LOGITS)
    assert "the sum follows" not in text_of(tmp_path / "page.html")


def test_a_page_of_nothing(tmp_path):
    write_report(tmp_path / "page.html", {}, [])
    source, text = (tmp_path / "page.html").read_text(), text_of(tmp_path / "page.html")
    assert "Distillation of a student" in text
    assert "No validation loss was measured" in text
    assert "<svg" not in source
    assert "<table" not in source


def test_without_matplotlib_there_are_tables_and_no_headings_without_drawings(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "can_plot", lambda: False)
    write_report(tmp_path / "page.html", RESULT, HISTORY)
    source = (tmp_path / "page.html").read_text()
    assert "closed 75.0 %" in source
    assert source.count("<table") == 2
    assert "<svg" not in source
    assert "<h2" not in source
