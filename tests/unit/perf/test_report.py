import importlib.util
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nemo_opt.errors import DataError
from nemo_opt.pages import can_plot
from nemo_opt.perf import words
from nemo_opt.perf.accepted import Accepted
from nemo_opt.perf.page import write_html
from nemo_opt.perf.record import Figure, Record
from nemo_opt.perf.report import Report, differences
from nemo_opt.perf.sparkline import sparkline
from nemo_opt.perf.summary import write_json, write_markdown
from nemo_opt.perf.terminal import show
from nemo_opt.perf.verdict import Judgement, Step, Verdict

spec = importlib.util.spec_from_file_location("perf_browser", Path(__file__).with_name("browser.py"))
browser_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser_module)

HOSTILE = '<script>alert(1) & "a|b" `$x$` [y](z) * ' + "long" * 30


def judgement(series, verdict="OK", *, reason="", **more):
    return Judgement(series=series, verdict=Verdict(verdict), reason=reason, **more)


def accepted(series, since):
    return Accepted(series=series, since=since, reason="meant", author="A. Person")


def figure(case="TP1", value=0.7, *, bench="KL loss", metric="time over ModelOpt's", **more):
    return Figure(bench=bench, case=case, metric=metric, value=value, **more)


def run(day, *figures, **more):
    values = {"commit": f"{day:07x}{'0' * 33}", "platform": "linux-2-cores", "environment": {"torch": "2.10"}, "run_id": f"{day:08x}"}
    return Record(**{"started": f"2026{1 + day // 28:02d}{1 + day % 28:02d}T120000Z", **values, "figures": figures, **more})


def report(*runs, judgements=(), levels=()):
    return Report(record=runs[-1], older=runs[:-1], judgements=judgements, levels=levels)


def invented(number=20):
    """A report with each verdict, a goal reached and one missed, an exact figure, a change of the environment, names that need escaping."""
    peer = {"peer": "ModelOpt's", "peer_value": 1.0, "limit": 0.67}
    runs = []
    for day in range(number):
        wave = 1 + 0.01 * (day * 7 % 5 - 2)
        figures = [
            figure(f"case {i}", 0.7 * wave * (1.2 if i == 0 and day >= 14 else 1), goal=0.75, samples=(0.6, 0.7, 0.8), **peer)
            for i in range(6)
        ]
        figures += [figure(HOSTILE, 1.3 * wave, bench=HOSTILE, metric=HOSTILE, direction="higher", goal=2.8, peer=HOSTILE)]
        figures += [figure("500 MB", 1234567.0, bench="export", metric="bytes on disk", unit="B", kind="exact")]
        figures += [
            figure("all", 18234.0 * wave, bench="texts", metric="tokens a second", unit="tokens/s", kind="time", direction="higher")
        ]
        figures = figures[:3] + figures[4:] if day == number - 1 else figures
        environment = {"torch": "2.10" if day < 14 else "2.11", "kernel": HOSTILE}
        failed = (f"test_checkpoint.py::{HOSTILE}",) if day == number - 1 else ()
        runs.append(run(day, *figures, environment=environment, failed=failed, subject=HOSTILE, load=(0.4, 1.9), time_s=61.0))
    names = [f"KL loss/case {i}/time over ModelOpt's" for i in range(6)]
    first = min(14, number - 1)
    judgements = [
        judgement(
            names[0],
            verdict="REGRESSION",
            change=0.2,
            baseline=0.7,
            n=19,
            reason="level shift",
            at=Step(before=runs[first - 1], after=runs[first]),
        ),
        judgement(names[1], verdict="IMPROVEMENT", change=-0.1, baseline=0.7, n=19),
        judgement(names[2], verdict="INCONCLUSIVE", reason=HOSTILE),
        judgement(names[3], verdict="MISSING", baseline=0.7, n=19, reason="measured before"),
        judgement(names[4], verdict="ENV_CHANGED", reason="torch changed"),
        judgement(names[5], verdict="OK", change=0.001, baseline=0.7, n=19),
    ]
    return report(*runs, judgements=judgements, levels=[accepted(names[5], since) for since in (runs[3].commit[:7], "fffffff")])


@pytest.fixture
def no_plots(monkeypatch):
    """As where matplotlib is not installed."""
    monkeypatch.setattr("nemo_opt.pages.can_plot", lambda: False)


def html_of(one, tmp_path):
    write_html(one, tmp_path / "p.html")
    return (tmp_path / "p.html").read_text(encoding="utf-8")


def text_of(html):
    """What a reader sees, on one line."""
    body = html[html.find("<body>") + 1 :]
    return " ".join(re.sub(r"<title>.*?</title>|<[^>]+>", " ", body).replace("\xa0", " ").replace("&#39;", "'").split())


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_sorted_by_severity_and_size():
    names = [f"KL loss/{case}/time over ModelOpt's" for case in "abcdefgh"]
    verdicts = ["OK", "NO_BASELINE", "IMPROVEMENT", "INCONCLUSIVE", "ENV_CHANGED", "MISSING", "REGRESSION", "REGRESSION"]
    changes = [None] * 6 + [0.1, 0.4]
    judgements = [judgement(n, verdict=v, change=c) for n, v, c in zip(names, verdicts, changes, strict=True)]
    rows = report(run(0, *map(figure, "abcdegh")), judgements=judgements).rows
    assert [row.series.split("/")[1] for row in rows] == list("hgfedcba")
    assert {row.verdict for row in rows} == set(Verdict)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(DataError, match="a run of linux-2-cores beside those of another"):
        report(run(0, figure(), platform="another"), run(1, figure()))
    with pytest.raises(DataError, match="judged twice: KL loss/TP1"):
        report(run(0, figure()), judgements=[judgement(figure().series)] * 2)


def test_nothing_is_left_out():
    one = report(run(0, figure("a")), run(1, figure("b")), judgements=[judgement(figure("a").series, verdict="MISSING")])
    assert [(row.series, row.verdict, row.figure is None) for row in one.rows] == [
        (figure("a").series, "MISSING", True),
        (figure("b").series, "NO_BASELINE", False),
    ]
    assert not one.good
    assert one.summary == "2 figures: 1 missing, 1 no baseline"


@pytest.mark.parametrize(("verdict", "good"), [(v, v not in ("REGRESSION", "MISSING")) for v in Verdict])
def test_only_regressions_missing_figures_and_failures_are_not_good(verdict, good):
    judgements = [judgement(figure().series, verdict=verdict)]
    one = report(run(0, figure()), judgements=judgements)
    assert one.good is good
    assert one.outcome == ("not good" if not good else "good" if verdict in ("OK", "IMPROVEMENT") else "undecided")
    assert not report(run(0, figure(), failed=("test_x",)), judgements=judgements).good
    assert not report(run(0)).good, "a run without figures"


def test_runs_are_in_order_up_to_this_one():
    runs = [run(day, figure()) for day in range(3)]
    one = Report(record=runs[2], older=[runs[1], runs[2], run(3, figure()), runs[0]])
    assert one.runs == tuple(runs)
    assert [point.run for point in one.rows[0].points] == [1, 2, 3]


def test_a_run_repeats_the_level_that_was_accepted():
    runs = [run(day, figure(value=value, kind="memory")) for day, value in enumerate([1.0, 1.0, 0.9, 0.9])]
    level = accepted(figure().series, runs[2].started)
    assert [report(*runs[:n]).repeated for n in (2, 3, 4)] == [(1, 1), (0, 1), (0, 1)]
    assert [report(*runs[:n], levels=[level]).repeated for n in (2, 3, 4)] == [(1, 1), (0, 0), (1, 1)]


def test_what_one_run_does_not_know_is_no_difference():
    before = run(0, environment={"torch": "2.10", "python": "3.12", "gone": "1", "threads": ""})
    after = run(1, environment={"torch": "2.11", "python": "3.12", "driver": "570", "threads": "2"})
    assert differences(before, after) == ["torch 2.10 -> 2.11", "threads none -> 2"]


def attribution(*runs, before, after):
    at = Step(before=before, after=after)
    return report(*runs, judgements=[judgement(figure().series, "REGRESSION", at=at)]).rows[0].attribution


def test_attribution_names_the_commits_and_the_environment():
    a, b, c = run(1, figure()), run(2, figure()), run(3, figure(), environment={"torch": "2.11"})
    assert attribution(a, b, c, before=a, after=b) == "change at run 2: 0000001..0000002"
    assert attribution(a, b, c, before=b, after=c) == "change at run 3: 0000002..0000003, torch 2.10 -> 2.11 in the same step"
    assert attribution(a, b, c, before=a, after=c) == "change at run 3: 0000001..0000003, torch 2.10 -> 2.11 in the same step"
    same = replace(b, commit=a.commit)
    assert attribution(a, same, before=a, after=same) == "change at run 2: both runs are of 0000001"
    dirty = replace(same, dirty=True)
    assert attribution(a, dirty, before=a, after=dirty) == "change at run 2: 0000001..0000001+"
    assert attribution(b, c, before=a, after=a).startswith("change at the run of 20260102T120000Z, which is not among these")
    assert report(a, b, judgements=[judgement(figure().series)]).rows[0].attribution == ""


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("amount", "unit", "kind", "text"),
    [
        (0.7, "", "ratio", "0.700"),
        (12.345, "", "ratio", "12.3"),
        (0.0432, "s", "time", "43.2 ms"),
        (75.0, "s", "time", "75.0 s"),
        (18234.2, "tokens/s", "time", "18,234 tokens/s"),
        (268435456.0, "B", "memory", "256 MiB"),
        (1234567.0, "B", "exact", "1,234,567 B"),
        (0.0, "s", "time", "0 s"),
        (-0.5, "", "ratio", "-0.500"),
        (1e-12, "", "ratio", "1.00e-12"),
        (float("nan"), "s", "time", "nan"),
    ],
)
def test_numbers(amount, unit, kind, text):
    assert words.number(amount, unit, kind) == text


@given(st.floats(1e-6, 1e6), st.integers(-40, 40), st.sampled_from(["lower", "higher"]))
@settings(deadline=None)
def test_a_written_value_never_contradicts_its_word(goal, step, direction):
    one = figure(value=goal * (1 + step * 1e-5), goal=goal, direction=direction)
    written = replace(one, value=float(words.value(one).replace(",", "")))
    assert one.value == goal or written.reached == one.reached


def test_goals_are_written_as_given():
    assert words.goal(figure(goal=0.75)) == "≤ 0.75"
    assert words.goal(figure(goal=2.8, direction="higher")) == "≥ 2.8"
    assert words.goal(figure(goal=0.0012, unit="s", kind="time")) == "≤ 1.2 ms"
    assert words.limit(figure(limit=float("inf"))) == "inf"
    assert words.goal(figure()) == words.reached(figure()) == ""
    assert words.value(figure(value=0.7504, goal=0.75)) == "0.7504"
    assert [words.reached(figure(value=value, goal=0.75)) for value in (0.75, 0.76)] == ["✓ reached", "✗ missed"]


# ---------------------------------------------------------------------------------------------------------------- sparklines


@given(st.lists(st.tuples(st.booleans(), st.floats(1e-9, 1e9)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_a_sparkline_stays_in_its_box(history):
    runs = [run(day, *([figure(value=value)] if measured else [])) for day, (measured, value) in enumerate(history)]
    one = report(
        *runs, judgements=[judgement(figure().series, baseline=0.5, at=Step(before=runs[0], after=runs[-1]), verdict="REGRESSION")]
    )
    svg = sparkline(one.rows[0], len(runs))
    assert (svg == "") == (not any(measured for measured, _ in history))
    for x, y in re.findall(r"[ML](-?[\d.]+|nan) (-?[\d.]+|nan)", svg):
        assert -1 <= float(x) <= 150
        assert 0 <= float(y) <= 44


def test_a_sparkline_shows_what_happened():
    (row,) = (row for row in invented().rows if row.verdict == "REGRESSION")
    svg = sparkline(row, 20)
    assert svg.count('class="changed"') == svg.count('class="environment"') == svg.count('class="baseline"') == 1
    label = re.search(r'aria-label="([^"]*)"', svg)[1]
    assert "20 values in 20 runs; from 0.686 to 0.857, last 0.848; compared with 0.700; changed at run 15; " in label
    assert "environment changed at run 15: torch 2.10 -&gt; 2.11" in label
    assert f"<title>{label}</title>" in svg
    assert ">0.857</text>" in svg
    assert ">0.686</text>" in svg
    (accepted,) = (row for row in invented().rows if row.levels)
    assert accepted.levels == (4,)
    assert sparkline(accepted, 20).count('class="level"') == 1
    assert "accepted level from run 4" in sparkline(accepted, 20)


def test_a_sparkline_is_broken_where_a_run_lacks_the_figure():
    runs = [run(day, *([] if day in (2, 4) else [figure()])) for day in range(6)]
    path = re.search(r'class="line" d="([^"]*)"', sparkline(report(*runs).rows[0], 6))[1]
    assert [path.count(letter) for letter in "MLh"] == [3, 1, 2], "two runs joined, two alone"


def test_equal_values_have_one_label():
    svg = sparkline(report(run(0, figure()), run(1, figure())).rows[0], 2)
    assert svg.count(">0.700</text>") == 1


# ---------------------------------------------------------------------------------------------------------------- the page


@pytest.mark.usefixtures("no_plots")
def test_every_figure_is_on_the_page_with_all_that_is_known(tmp_path):
    one = invented()
    html = html_of(one, tmp_path)
    text = text_of(html)
    assert html.count('class="figure"') == len(one.rows) == 9
    assert html.count('class="spark" role="img" aria-label="') == 9
    for row in one.rows:
        assert row.figure is None or words.value(row.figure) in text
    assert text.index("✗ regression") < text.index("✗ missing") < text.index("! environment changed") < text.index("✓ ok")
    assert "KL loss: case 3 time over ModelOpt's measured before" in text
    for part in (
        "≤ 0.75 ✓ reached",
        "≥ 2.8 ✗ missed",
        "+20.0 % worse of 0.700, 19 runs",
        "\N{MINUS SIGN}10.0 % better",
        "±14.3 % in 3 rounds",
    ):
        assert part in text
    assert "change at run 15: 000000d..000000e, torch 2.10 -&gt; 2.11 in the same step" in text
    assert "4 of 6 reached" in text
    assert "\N{BALLOT X} Not good: 9 figures: 1 regression, 1 missing" in text
    assert "0.40 before, 1.90 after" in text
    assert "Benchmark failed, its figures are missing: test_checkpoint.py::" in text
    assert all(record.started in text for record in one.runs)
    assert "Ratios over the runs" not in text


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed: `pip install matplotlib` runs this test")
def test_ratios_are_drawn(tmp_path):
    runs = [run(day, figure(HOSTILE, 0.7 + 0.01 * day, goal=0.75, limit=0.6, peer_value=1.0), figure("n", kind="time")) for day in range(3)]
    html = html_of(
        report(*runs, judgements=[judgement(figure(HOSTILE).series, verdict="REGRESSION", at=Step(before=runs[0], after=runs[1]))]),
        tmp_path,
    )
    assert html.count(" over 3 runs") == 1, "a time of one machine is no ratio"
    drawing = html[html.index(" over 3 runs") : html.index("Environment</h2>")]
    assert ">goal<" in drawing.replace(" ", "")
    assert "&lt;script&gt;" in drawing
    assert "Ratios over the runs" in html


@pytest.mark.usefixtures("no_plots")
def test_hostile_names_are_text(tmp_path):
    html = html_of(invented(), tmp_path)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1) &amp; &#34;a|b&#34;" in html
    for label in re.findall(r'aria-label="([^"]*)"', html):
        assert "<" not in label


def test_a_page_loads_nothing(tmp_path):
    html = html_of(invented(4), tmp_path)
    assert not re.search(r"""\b(?:src|href|data|action|poster)\s*=\s*["']?[^"'#\s]|url\([^#)]|@import|<script|<link|<iframe""", html)
    assert {link for link in re.findall(r"https?://[^\s\"'<]+", html) if not link.startswith("http://www.w3.org/")} == set(), (
        "names of namespaces only"
    )


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("number", [0, 1, 199])
def test_histories_of_any_length(tmp_path, number):
    older = [run(day, figure(value=0.7 + 0.001 * (day % 7))) for day in range(number)]
    html = html_of(report(*older, run(number, figure())), tmp_path)
    text = text_of(html)
    assert html.count('class="figure"') == 1
    assert f"run {number + 1} " in text
    assert "! Undecided: 1 figure: 1 no baseline" in text
    assert "\N{EN DASH} no baseline" in text
    assert "No figure of this run has a goal." in text
    assert ("170 older runs are left out" in text) == (number == 199)
    assert len(html) < 40_000


@pytest.mark.usefixtures("no_plots")
def test_a_run_without_figures_says_so(tmp_path):
    assert "✗ This run has no figures." in html_of(report(run(0)), tmp_path)
    write_markdown(report(run(0)), tmp_path / "p.md")
    assert "**Not good:** no figures" in (tmp_path / "p.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- Markdown, JSON, terminal


def test_markdown_is_one_table_of_every_figure(tmp_path):
    one = invented()
    write_markdown(one, tmp_path / "p.md")
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(one.rows)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}, "a bar in a name ends no cell"
    assert (
        "| ✗ regression | KL loss | case 0 | time over ModelOpt's | 0.848 | ±7.9 % | 1.00 ModelOpt's "
        "| 0.67 | ≤ 0.75 | ✗ missed | +20.0 % worse |" in table
    )
    assert (
        "**KL loss/case 0/time over ModelOpt's**: level shift; change at run 15: 000000d..000000e, torch 2.10 -&gt; 2.11 in the same step"
        in text
    )
    assert "<script" not in text
    assert not re.search(r"(?<!\\)[`$]", text)
    assert r"\[y\](z) \*" in text


def test_json_round_trip(tmp_path):
    one = invented()
    broken = judgement("gone/gone/gone", change=float("nan"), baseline=float("inf"), verdict="NO_BASELINE")
    one = replace(one, judgements=[*one.judgements, broken])
    write_json(one, tmp_path / "p.json")
    values = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert values["summary"] == one.summary
    assert values["goals"] == {"reached": 4, "of": 6}
    assert values["good"] is False
    assert [row["series"] for row in values["rows"]] == [row.series for row in one.rows]
    by_series = {row["series"]: row for row in values["rows"]}
    for made in one.record.figures:
        told = by_series[made.series]
        assert Figure(
            **{
                name: told[name]
                for name in ("bench", "case", "metric", "value", "unit", "kind", "direction", "peer", "peer_value", "limit", "goal")
            }
        ) == replace(made, samples=())
        assert told["reached"] is made.reached
    first = values["rows"][0]
    assert (first["verdict"], first["change"], first["n"], first["changed_at_run"]) == ("REGRESSION", 0.2, 19, 15)
    assert [point["value"] for point in first["history"]] == [point.value for point in one.rows[0].points]
    assert by_series[broken.series]["change"] is None


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_terminal_shows_every_figure_at_any_width(width):
    one = invented()
    output = io.StringIO()
    show(one, Console(file=output, width=width))
    lines = output.getvalue().splitlines()
    text = "".join(output.getvalue().split())
    for row in one.rows:
        assert row.names[1].split()[0] in text
        assert row.figure is None or words.value(row.figure).replace(" ", "") in text
    assert "✓reached" in text
    assert "✗missed" in text
    assert lines[-1].strip() == one.summary, "the last line, unbroken, for a program"
    if width == 160:
        heading = next(line for line in lines if "verdict" in line)
        assert heading.split() == ["what", "case", "metric", "value", "noise", "peer", "limit", "goal", "reached", "verdict"]
        assert sum("KL loss  " in line for line in lines) == 1, "a bench is named once"


# ---------------------------------------------------------------------------------------------------------------- in a browser

MEASURE = """JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, dark: matchMedia('(prefers-color-scheme: dark)').matches,
  rows: [...document.querySelectorAll('tr.figure')].filter(one => one.getBoundingClientRect().height > 20).length,
  sparks: [...document.querySelectorAll('tr.figure svg.spark')].filter(one => one.getBoundingClientRect().width > 100).length,
  outside: [...document.querySelectorAll('table.figures td *')].filter(one => one.getBoundingClientRect().right > innerWidth + .5).length,
  spilled: [...document.querySelectorAll('table.figures td *')]
    .filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0 && !one.closest('svg')).length,
  background: getComputedStyle(document.body).backgroundColor,
  colours: [...new Set([...document.querySelectorAll('body *:not(style, title)')]
    .filter(one => [...one.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
    .map(one => one.closest('svg') ? getComputedStyle(one).fill : getComputedStyle(one).color))],
  text: getComputedStyle(document.body).color, main: getComputedStyle(document.querySelector('svg.spark path.line')).stroke,
})"""


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Of WCAG: from 1 to 21; 4.5 is asked of text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01), "the lightest grey that fails"


@pytest.fixture(scope="module")
def browser():
    if browser_module.find() is None:
        pytest.skip(browser_module.MISSING)
    with browser_module.Chromium() as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "p.html"
    write_html(invented(), place)
    return place


@pytest.mark.parametrize(("width", "theme"), list(itertools.product((360, 390, 1000, 1400), ("light", "dark"))))
def test_the_page_in_a_browser(browser, page, width, theme):
    browser.open(page, width=width, theme=theme)
    seen = json.loads(browser.evaluate(MEASURE))
    assert seen["width"] == width
    assert seen["scroll"] <= width, "the page scrolls sideways"
    assert seen["outside"] == 0, "part of a figure is off the screen"
    assert seen["spilled"] == 0, "a word runs into the next column"
    assert (seen["rows"], seen["sparks"]) == (9, 9)
    assert seen["dark"] is (theme == "dark")
    assert (luminance(seen["background"]) < luminance(seen["text"])) is (theme == "dark")
    assert len(seen["colours"]) >= 4, "text, soft, good and bad"
    too_faint = {colour: contrast(colour, seen["background"]) for colour in seen["colours"] if contrast(colour, seen["background"]) < 4.5}
    assert not too_faint
    assert contrast(seen["main"], seen["background"]) >= 3, "of a line"
    assert browser.console == []
    assert browser.requests == [page.as_uri()], "something else was loaded"
    assert "Performance: 9 figures" in browser.evaluate("document.title")


def test_the_browser_tells_a_bad_page(browser, tmp_path):
    place = tmp_path / "bad.html"
    script = "<script>console.error('broken'); missing()</script>"
    place.write_text(f"<body><svg class=spark><path class=line></svg><p style='width: 3000px'>x{script}<img src=none.png>")
    browser.open(place, width=390, theme="light")
    seen = json.loads(browser.evaluate(MEASURE))
    assert seen["scroll"] > seen["width"]
    assert "broken" in browser.console
    assert any("Uncaught" in text for text in browser.console)
    assert (tmp_path / "none.png").as_uri() in browser.requests
