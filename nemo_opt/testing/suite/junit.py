"""A run as JUnit XML, which CI systems read: a test case for each script, the end of its log, its numbers as properties."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from nemo_opt.testing.assertions import key_numbers
from nemo_opt.testing.suite.report import Report
from nemo_opt.testing.suite.verdict import Outcome, Status

__all__ = ["write"]

_LONGEST_LOG = 20_000
_NUMBERS = 20
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}
_ELEMENTS = {Status.FAIL: "failure", Status.TIMEOUT: "error", Status.INFRASTRUCTURE: "error", Status.NOT_RUN: "skipped"}


def write(report: Report, place: Path) -> None:
    """Writes the file. What does not count, because it is in quarantine, is skipped in it, with its verdict."""
    cases = [_case(outcome) for outcome in report.outcomes]
    counts = {key: sum(case.find(element) is not None for case in cases) for key, element in _COUNTED.items()}
    suite = ET.Element("testsuite", name="functional", tests=str(len(cases)), time=f"{report.run.time_s:.3f}", timestamp=report.run.started)
    suite.attrib.update({key: str(number) for key, number in counts.items()})
    suite.extend(cases)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    ET.ElementTree(root).write(place, encoding="utf-8", xml_declaration=True)


def _case(outcome: Outcome) -> ET.Element:
    script = outcome.script
    case = ET.Element("testcase", classname=script.layout or "no layout", name=outcome.name, time=f"{outcome.time_s:.3f}")
    numbers = {"asserted": str(len(outcome.assertions)), **key_numbers(outcome.assertions, _NUMBERS)}
    properties = ET.SubElement(case, "properties")
    for name, value in ({"tier": script.tier, "owner": script.owner, "status": str(outcome.status)} | numbers).items():
        ET.SubElement(properties, "property", name=_legal(name), value=_legal(value))
    if outcome.status is not Status.PASS:
        _add_verdict(case, outcome)
    if outcome.log is not None:
        ET.SubElement(case, "system-out").text = _legal(Path(outcome.log).read_text(errors="replace")[-_LONGEST_LOG:])
    return case


def _add_verdict(case: ET.Element, outcome: Outcome) -> None:
    script = outcome.script
    if script.quarantined:
        message = f"{outcome.status}: {outcome.reason} (in quarantine until {script.expires}: {script.issue})"
        ET.SubElement(case, "skipped", message=_legal(message))
    else:
        ET.SubElement(case, _ELEMENTS[outcome.status], type=str(outcome.status), message=_legal(outcome.reason))


def _legal(text: str) -> str:
    """Without characters that XML cannot hold, of which logs are full."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
