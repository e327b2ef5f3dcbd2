"""How a run is told: table, JUnit XML, JSON and page agree, and none calls something passed that was not."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from nemo_opt.testing.suite import page


@pytest.fixture
def told(functional, tmp_path, capsys):
    """A run of everything, twice, and all that is told of the second."""
    functional.write("L2_Good_TP2PP1", "holds", ranks=2)
    functional.write("L2_Good_TP1PP2", "holds", ranks=2)
    functional.write("L2_Bad", r"printf '\033[31mred <b>\000 \xff\n'; holds; exit 3")
    functional.write("L2_Slow", "exit 124")
    functional.write("L2_Gpu", device="cuda")
    functional.write("L2_Machine", "exit 75")
    functional.write("L2_Known", "exit 1", quarantined=True, issue="#7 & more".replace(" ", ""))
    metrics = """holds; mkdir -p "$NEMO_OPT_METRICS"; for step in 1 2 3; do echo "{\\"step\\": $step, \\"loss\\": $step.5}"; done """
    functional.write("L2_Loss", metrics + '>"$NEMO_OPT_METRICS/run_metrics.jsonl"')
    places = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "html", "json")}
    functional.run(quarantined=True)
    functional.write("L2_Good_TP2PP1", "holds; holds", ranks=2)
    assert functional.run(quarantined=True, **places)[0] == 1
    return {**{kind: place.read_text() for kind, place in places.items()}, "table": capsys.readouterr().out}


STATUSES = {
    "L2_Bad": "fail",
    "L2_Good_TP1PP2": "pass",
    "L2_Good_TP2PP1": "pass",
    "L2_Gpu": "not run",
    "L2_Known": "fail",
    "L2_Loss": "pass",
    "L2_Machine": "infrastructure",
    "L2_Slow": "timeout",
}


def test_every_report_says_the_same(told):
    """One run, four tellings."""
    assert {row["name"]: row["status"] for row in json.loads(told["json"])["scripts"]} == STATUSES
    rows = re.findall(
        r"^ ?(L2_\w+) +(pass|fail|timeout|infrastructure|not run)\b", told["table"].split("Functional scripts")[-1], re.MULTILINE
    )
    assert dict(rows) == STATUSES
    cells = re.findall(r'<h3 id="(L2_\w+)"><span class="(\w+)">([\w ]+)</span>', told["html"])
    assert {name: status for name, _, status in cells} == STATUSES
    assert {name: css for name, css, _ in cells} == {
        name: "soft" if name in ("L2_Gpu", "L2_Known") else "good" if status == "pass" else "bad" for name, status in STATUSES.items()
    }

    suite = ET.fromstring(told["junit"]).find("testsuite")
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8",
        "failures": "1",
        "errors": "2",
        "skipped": "2",
    }
    found = {}
    for case in suite:
        found[case.get("name")] = [(e.tag, e.get("type")) for e in case if e.tag in ("failure", "error", "skipped")]
    assert found == {
        "L2_Bad": [("failure", "fail")],
        "L2_Good_TP1PP2": [],
        "L2_Good_TP2PP1": [],
        "L2_Gpu": [("skipped", "not run")],
        "L2_Known": [("skipped", None)],
        "L2_Loss": [],
        "L2_Machine": [("error", "infrastructure")],
        "L2_Slow": [("error", "timeout")],
    }

    check_table(told["table"])
    check_junit(suite)
    check_json(json.loads(told["json"]))
    check_page(told["html"])


def check_table(table):
    last = table.strip().splitlines()[-1]
    assert re.fullmatch(r"8 scripts in \d+ s: 3 pass, 1 fail, 1 timeout, 1 infrastructure, 1 not run, 1 fail in quarantine", last), last
    assert "loss 0.5" in table
    assert "(usually 0 s)" in table
    assert "in quarantine until 2999-01-01: #7&more" in table


def check_junit(suite):
    cases = {case.get("name"): case for case in suite}
    assert cases["L2_Good_TP2PP1"].get("classname") == "TP2PP1"
    properties = {p.get("name"): p.get("value") for p in cases["L2_Good_TP2PP1"].iter("property")}
    assert properties == {"tier": "L2", "owner": "@x", "status": "pass", "asserted": "2", "loss": "0.5"}
    assert cases["L2_Bad"].find("failure").get("message") == "exit code 3"
    assert "red <b>\N{REPLACEMENT CHARACTER}" in cases["L2_Bad"].findtext("system-out"), "what XML cannot hold is replaced"
    assert "#7&more" in cases["L2_Known"].find("skipped").get("message")


def check_json(report):
    assert (report["schema"], report["exit_code"], report["device"], report["fresh"]) == (1, 1, "cpu", True)
    assert "torch" in report["versions"]
    good = next(row for row in report["scripts"] if row["name"] == "L2_Good_TP2PP1")
    assert [a["what"] for a in good["assertions"]] == ["loss < 1"] * 2
    assert good["usual_s"] > 0


class Links(HTMLParser):
    """Everything that a page refers to, and its open tags."""

    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "action", "data")]


def check_page(text):
    parser = Links()
    parser.feed(text)
    assert parser.links
    assert all(link.startswith("#") for link in parser.links), "one file, nothing from elsewhere"
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert len(set(re.findall(r'href="#(\w+)"', text)) - set(re.findall(r'id="(\w+)"', text))) == 0
    assert "red &lt;b&gt;" in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "#7&amp;more" in text
    assert text.count("<rect ") >= 2 * len(STATUSES), "a bar for each run of each script"
    assert 'aria-label="Losses of run"' in text
    assert text.count("<td>L2_Good</td>") == 1, "one row for two layouts"
    assert len(text) < 300_000


def test_fewer_assertions_than_before_are_shown(functional, tmp_path, capsys):
    """A check that no longer runs is the quietest of faults."""
    functional.write("L2_A", "holds; holds; holds")
    functional.run()
    capsys.readouterr()
    functional.write("L2_A", "holds")
    functional.run(html=tmp_path / "p.html")
    assert "1 (3 before)" in capsys.readouterr().out
    assert "(3 before)" in (tmp_path / "p.html").read_text()


def test_a_long_log_is_cut_in_the_middle(tmp_path):
    log = tmp_path / "log"
    log.write_text("begin\n" + "x" * 100_000 + "\nend\r50 %\r100 %\n")
    shown = page._log(log)
    assert shown["left_out"] == log.stat().st_size - 32_000
    assert shown["texts"][0].startswith("begin\n")
    assert shown["texts"][1].endswith("\nend\n50 %\n100 %\n")
    log.write_text("short")
    assert page._log(log) == {"path": str(log), "texts": ["short"], "left_out": 0}


def test_a_log_of_losses_that_was_cut_short_is_drawn_as_far_as_it_goes(tmp_path):
    (tmp_path / "a_metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2.0}\n{"step": 4, "lo'
    )
    (tmp_path / "b_metrics.jsonl").write_text('{"step": 1, "other": 3.0}\n')
    lines = page._lines(tmp_path / "a_metrics.jsonl")
    assert page._points(lines, "loss") == [(1, 3.0), (3, 2.0)]
    assert page._points(lines, "kd_loss") == []
    assert len(page._drawings(tmp_path)) == 1
    assert page._drawings(tmp_path / "missing") == []
