import re

import jinja2
import pytest

from nemo_opt.pages import COLOURS, plot, write_page


def draw(figure):
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [3, 1, 2], color=COLOURS["main"])
    axes.set_xlabel("loss & <size>")
    axes.fill_between([1, 2], [0, 0], [1, 1], color=COLOURS["bad"], alpha=0.2)


def test_plot_takes_its_colours_from_the_page():
    svg = plot(draw, title='Loss "before" & after')
    assert svg.startswith('<svg role="img" aria-label="Loss &quot;before&quot; &amp; after" ')
    assert svg.rstrip().endswith("</svg>")
    assert {"var(--main)", "var(--bad)", "var(--text)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#0[1-7]0", svg), "a placeholder is left"
    assert "loss &amp; &lt;size&gt;" in svg, "text is text"
    assert "font-family: inherit" in svg
    assert "DejaVu" not in svg
    assert "<metadata" not in svg
    assert plot(draw, title='Loss "before" & after') == svg, "the same drawing gives the same bytes"


def test_placeholders_are_distinct():
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_no_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot(draw, title="x") == ""


def test_page_has_every_colour_for_both_themes(tmp_path):
    record = {"rows": [], "good": True, "time_s": 1.0, "goal_s": 2, "fixtures": "<F>", "versions": {}, "drawing": ""}
    write_page("quickstart.html.j2", tmp_path / "p.html", **record)
    text = (tmp_path / "p.html").read_text()
    for name in COLOURS:
        assert text.count(f"--{name}: #") == 2
    assert "&lt;F&gt;" in text
    del record["goal_s"]
    with pytest.raises(jinja2.UndefinedError, match="goal_s"):
        write_page("quickstart.html.j2", tmp_path / "p.html", **record)
