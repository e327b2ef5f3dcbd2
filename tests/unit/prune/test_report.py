"""The report of a pruning: what its axes, drawings and tables say, read back from matplotlib's artists and from the template's values."""

from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from nemo_opt.models.config import preset
from nemo_opt.pages import COLOURS
from nemo_opt.prune.importance import ImportanceScores
from nemo_opt.prune.report import Axis, _thinned, axes_of, write_report
from nemo_opt.prune.selection import Kept, KeptLayer

MODEL = preset("tiny", num_layers=3, hidden_size=4, ffn_hidden_size=3, num_attention_heads=4, num_query_groups=2, kv_channels=2)
LAYER = KeptLayer(heads=[1, 3], groups=[0, 1], ffn=[[0, 2]])
KEPT = Kept(hidden=[0, 3], layers={1: LAYER, 3: KeptLayer(heads=[0, 2], groups=[0, 1], ffn=[[1, 2]])})


def scores(model=MODEL, **changes):
    layers = range(1, model.num_layers + 1)
    fields = {
        "hidden": torch.tensor([4.0, 1.0, 2.0, 3.0]),
        "ffn": {n: torch.tensor([3.0, 1.0, 2.0]) * n for n in layers},
        "heads": {n: torch.tensor([1.0, 4.0, 2.0, 3.0]) + n for n in layers},
        "groups": {n: torch.tensor([2.0, 1.0]) for n in layers},
        "layers": torch.tensor([0.5, 0.1, 0.4]),
        "model": model,
        "tokens": 96,
        "digest": "",
    }
    return ImportanceScores(**(fields | changes))


def mixture():
    """Two experts of three, of three channels each, in two layers."""
    channels = torch.arange(9.0).view(3, 3)
    experts = {1: torch.tensor([3.0, 1.0, 2.0]), 2: torch.tensor([1.0, 2.0, 3.0])}
    layer = {"heads": [0, 1, 2, 3], "groups": [0, 1], "ffn": [[0], [1], [2]]}
    kept = Kept(hidden=range(4), layers={1: KeptLayer(**layer, experts=[0, 2]), 2: KeptLayer(**layer, experts=[1, 2])})
    model = MODEL.with_(num_layers=2, num_moe_experts=3)
    return scores(model, ffn={1: channels, 2: channels + 1}, experts=experts), kept


def test_axes_of_a_dense_model():
    depth, width, ffn, heads, groups = axes_of(scores(), KEPT)
    assert (depth.name, depth.places, depth.kept) == ("Layers", ["model"], [[0, 2]])
    assert depth.scores == [pytest.approx([0.5, 0.1, 0.4])]
    assert (width.name, width.places, width.kept, width.scores) == ("Hidden channels", ["model"], [[0, 3]], [[4.0, 1.0, 2.0, 3.0]])
    assert (ffn.name, ffn.kept, ffn.scores) == ("MLP channels", [[0, 2], [1, 2]], [[3.0, 1.0, 2.0], [9.0, 3.0, 6.0]])
    assert (heads.name, heads.kept, heads.scores) == ("Query heads", [[1, 3], [0, 2]], [[2.0, 5.0, 3.0, 4.0], [4.0, 7.0, 5.0, 6.0]])
    assert (groups.name, groups.kept, groups.scores) == ("Query groups", [[0, 1], [0, 1]], [[2.0, 1.0], [2.0, 1.0]])
    assert all(axis.places == ["layer 1", "layer 3"] for axis in (ffn, heads, groups)), "of the layers that stay"
    assert [(axis.before, axis.after) for axis in (depth, width, ffn, heads, groups)] == [(3, 2), (4, 2), (3, 2), (4, 2), (2, 2)]


def test_axes_of_a_mixture_of_experts():
    _, _, ffn, _, _, experts = axes_of(*mixture())
    assert ffn.places == [f"layer {layer}, expert {expert}" for layer in (1, 2) for expert in (1, 2, 3)]
    assert ffn.kept == [[0], [1], [2]] * 2
    assert ffn.scores[4] == [4.0, 5.0, 6.0]
    assert (ffn.before, ffn.after) == (3, 1)
    assert (experts.name, experts.places, experts.kept) == ("Experts", ["layer 1", "layer 2"], [[0, 2], [1, 2]])
    assert experts.scores == [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]


def test_share_is_that_of_all_importance():
    axis = Axis(name="", places=["a", "b"], scores=[[1.0, 2.0], [3.0, 4.0]], kept=[[1], [0]])
    assert axis.share == pytest.approx(0.5)
    assert Axis(name="", places=["a"], scores=[[0.0, 0.0]], kept=[[1]]).share == 1.0


def sizes(model=MODEL, **changes):
    return model.to_dict() | changes


def report(kept=KEPT, of=None, *, before=None, after=None):
    """The template's values; `drawn(n)` is what the n-th drawing draws."""
    draws = []

    def plot(draw, *, title, **_):
        draws.append(draw)
        return title

    def drawn(index):
        figure = Figure()
        draws[index](figure)
        (axes,) = figure.axes
        return axes

    result = {"model_before": before or sizes(), "model_after": after or sizes(num_layers=2, hidden_size=2)}
    with patch("nemo_opt.pages.plot", plot), patch("nemo_opt.pages.write_page") as write:
        write_report("page", result, kept, of)
    ((template, path), values), *_ = [(call.args, call.kwargs) for call in write.call_args_list]
    assert (template, path, values["result"]) == ("pruning.html.j2", "page", result)
    return SimpleNamespace(**values, drawn=drawn)


def test_tables():
    page = report(of=scores(), after=sizes(num_layers=2, hidden_size=2, num_attention_heads=2))
    assert page.sizes == [("num_layers", 3, 2), ("hidden_size", 4, 2), ("num_attention_heads", 4, 2)]
    assert page.dropped == [2]
    assert page.heads == [(1, "1, 2", "2, 4"), (3, "1, 2", "1, 3")], "counted from 1"
    assert page.drawings == [
        f"Importance of {name}" for name in ("each layer", "hidden channels", "mlp channels", "query heads", "query groups")
    ]


@pytest.mark.parametrize(
    ("changes", "given", "shown"),
    [({"num_attention_heads": 2}, True, True), ({"num_query_groups": 1}, True, True), ({"hidden_size": 2}, True, False),
     ({"num_attention_heads": 2}, False, False)],
)  # fmt: skip
def test_heads_are_listed_where_importance_chose_among_them(changes, given, shown):
    assert bool(report(of=scores() if given else None, after=sizes(**changes)).heads) == shown


def test_layers_dropped_by_number_have_neither_axes_nor_drawings():
    page = report(Kept(hidden=range(4), layers={2: LAYER}))
    assert (page.dropped, page.axes, page.drawings) == ([1, 3], [], [])


def test_a_layers_bar_says_whether_it_stays():
    plot = report(of=scores()).drawn(0)
    bars = plot.patches
    assert [bar.get_height() for bar in bars] == pytest.approx([0.5, 0.1, 0.4])
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([1, 2, 3])
    assert [same_color(bar.get_facecolor(), COLOURS["main"]) for bar in bars] == [True, False, True]
    assert same_color(bars[1].get_facecolor(), COLOURS["line"])
    assert [(text.get_text(), text.xy) for text in plot.texts] == [("dropped", (2, pytest.approx(0.1)))]
    assert list(plot.get_xticks()) == [1, 2, 3]
    assert (plot.get_xlabel(), plot.get_ylabel()) == ("layer", "block influence")


@pytest.mark.parametrize(("count", "each"), [(40, True), (41, False)])
def test_every_layer_has_a_tick_while_there_is_room(count, each):
    model = MODEL.with_(num_layers=count)
    kept = Kept(hidden=range(4), layers=dict.fromkeys(range(1, count + 1), LAYER))
    plot = report(kept, scores(model, layers=torch.ones(count)), before=sizes(model), after=sizes(model)).drawn(0)
    assert (list(plot.get_xticks()) == list(range(1, count + 1))) == each
    assert not plot.texts


def curve(values, kept):
    """The plot of hidden channels with these scores."""
    model = MODEL.with_(hidden_size=len(values))
    page = report(Kept(hidden=kept, layers=KEPT.layers), scores(model, hidden=torch.tensor(values, dtype=torch.float64)))
    return page.drawn(1)


def test_a_curve_descends_from_one_and_marks_what_stays():
    plot = curve([1.0, 8.0, 2.0, 4.0], [1, 3])
    (line, cut), (dots,) = plot.lines, [c for c in plot.collections if len(c.get_offsets()) > 1]
    assert line.get_xydata().tolist() == [[1, 1.0], [2, 0.5], [3, 0.25], [4, 0.125]]
    assert dots.get_offsets().tolist() == line.get_xydata().tolist()
    assert [same_color(colour, COLOURS["main"]) for colour in dots.get_facecolors()] == [True, True, False, False]
    assert same_color(dots.get_facecolors()[2], COLOURS["back"])
    assert list(cut.get_xdata()) == [2.5, 2.5]
    assert same_color(cut.get_color(), COLOURS["bad"])
    (text,) = plot.texts
    assert (text.get_text(), text.xy) == ("cut at 2 of 4", (2.5, 1.0))
    (span,) = plot.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (2.5, 4.5)
    assert plot.get_xlim() == (0.5, 4.5)
    assert all(tick == round(tick) for tick in plot.get_xticks()), "there is no channel two and a half"
    assert plot.get_ylim() == (0, 1.05)
    assert plot.get_xlabel() == "most important first; filled ones stay"
    assert plot.get_ylabel() == "importance / largest"


def test_no_cut_is_drawn_where_none_was_made_or_scores_did_not_decide():
    assert len(curve([1.0, 2.0, 3.0], [0, 1, 2]).lines) == 1
    other = curve([1.0, 8.0, 2.0, 4.0], [0, 1])
    assert len(other.lines) == 1
    assert not other.texts
    (dots,) = other.collections
    assert [same_color(colour, COLOURS["main"]) for colour in dots.get_facecolors()] == [True, False, False, True]


def test_of_equal_scores_those_that_stay_come_first():
    plot = curve([1.0, 1.0, 1.0, 2.0], [2, 3])
    assert [text.get_text() for text in plot.texts] == ["cut at 2 of 4"]
    (dots,) = [c for c in plot.collections if len(c.get_offsets()) > 1]
    assert [same_color(colour, COLOURS["main"]) for colour in dots.get_facecolors()] == [True, True, False, False]


@pytest.mark.parametrize(("count", "marked"), [(64, True), (65, False)])
def test_dots_while_they_can_be_told_apart(count, marked):
    plot = curve([float(n) for n in range(count)], list(range(count)))
    assert bool(plot.collections) == marked
    assert ("filled ones stay" in plot.get_xlabel()) == marked


@example(values=[float(n) for n in range(500, 0, -1)])
@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=400).map(lambda values: sorted(values, reverse=True)))
def test_a_thinned_curve_keeps_both_ends_and_true_points(values):
    ranks, heights = _thinned(values)
    assert len(ranks) == min(len(values), 160)
    assert (ranks[0], ranks[-1]) == (1, len(values))
    assert max((b - a for a, b in pairwise(ranks)), default=1) <= -(-len(values) // 159)
    assert heights == [values[rank - 1] / values[0] if values[0] else 0.0 for rank in ranks]


def test_each_place_has_a_line_paler_the_more_there_are():
    page = report(of=scores())
    ffn, hidden = page.drawn(2), page.drawn(1)
    of_scores = [line for line in ffn.lines if same_color(line.get_color(), COLOURS["main"])]
    assert [list(line.get_ydata()) for line in of_scores] == [pytest.approx([1, 2 / 3, 1 / 3])] * 2, "each relative to its own largest"
    assert [line.get_alpha() for line in of_scores] == [0.9, 0.9]
    assert hidden.lines[0].get_alpha() == 1.0
    assert "a line a layer" in ffn.get_xlabel()
    assert "a line a layer" not in hidden.get_xlabel()
    many = scores(MODEL.with_(num_layers=20), layers=torch.ones(20))
    (line, *_) = report(Kept(hidden=[0], layers=dict.fromkeys(range(1, 21), LAYER)), many).drawn(2).lines
    assert line.get_alpha() == 0.25


def test_a_whole_page(tmp_path):
    result = {
        "path": "pruned", "layout": "TP1", "spec": "te", "device": "cpu", "time_s": 1.0, "search": None, "kept_layers": [1, 3],
        "parameters_before": 100, "parameters": 75, "loss_before": 1.0, "loss_after": 1.25, "importance_tokens": 96,
        "model_before": sizes(), "model_after": sizes(num_layers=2),
    }  # fmt: skip
    write_report(tmp_path / "page.html", result, KEPT, scores())
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg ") == 5
    assert "Layers 1, 3 stay; 2 is gone" in text
    assert 'aria-label="Importance of hidden channels"' in text
