"""A pytest plugin with the fixture `figure`: benchmarks hand in their numbers, which end up in one table and in a record.

`figure(bench="...", case="...", metric="...", value=..., peer=..., goal=...)` is `nemo_opt.perf.record.Figure`; times and ratios give their
`samples`, and the value is their median. `--record-to FOLDER` leaves the run as a record there, also when benchmarks failed: it names them.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nemo_opt.perf import platform, record, sources
from nemo_opt.perf.record import Figure, Record

__all__ = ["add_options", "figure"]

_FIGURES: pytest.StashKey[list[Figure]] = pytest.StashKey()
_FAILED: pytest.StashKey[list[str]] = pytest.StashKey()
_START = pytest.StashKey[tuple[datetime, float, float]]()

ROOT = Path(__file__).parents[2]


def add_options(parser: pytest.Parser) -> None:
    """The folder of records; for `pytest_addoption` of the conftest.py that loads this plugin, which is too late for one of its own."""
    group = parser.getgroup("benchmarks")
    group.addoption("--record-to", type=Path, default=None, metavar="FOLDER", help="leave the run as a record there")


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is measured yet."""
    config.stash[_FIGURES] = []
    config.stash[_FAILED] = []
    config.stash[_START] = datetime.now(UTC), time.monotonic(), os.getloadavg()[0]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Callable[..., Figure]]:
    """Hands in a figure; those of a test that then fails are dropped."""
    mine: list[Figure] = []

    def hand_in(**values: Any) -> Figure:
        samples = tuple(values.pop("samples", ()))
        value = values.pop("value") if "value" in values else statistics.median(samples)
        mine.append(Figure(value=float(value), samples=tuple(map(float, samples)), **values))
        return mine[-1]

    yield hand_in
    if request.node.stash.get(_PASSED, False):
        request.config.stash[_FIGURES].extend(mine)


_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Remembers what has failed."""
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    if report.failed:
        item.config.stash[_FAILED].append(item.nodeid)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One table of all, and the record."""
    figures = config.stash[_FIGURES]
    if not figures and not config.stash[_FAILED]:
        return
    run = _record(config)
    terminalreporter.section("figures")
    from nemo_opt.perf.report import Report
    from nemo_opt.perf.terminal import show

    show(Report(record=run, older=[], judgements=[]), judged=False)
    if folder := config.option.record_to:
        terminalreporter.write_line(f"recorded in {record.write(run, folder)}")


def _record(config: pytest.Config) -> Record:
    started, start, load = config.stash[_START]
    measured = sources.sources(ROOT)
    figures, failed = config.stash[_FIGURES], config.stash[_FAILED]
    return Record(
        started=started.strftime("%Y%m%dT%H%M%SZ"),
        commit=measured.commit,
        dirty=measured.dirty,
        subject=measured.subject,
        platform=platform.platform_key(),
        environment=platform.environment(),
        figures=tuple(figures),
        failed=tuple(dict.fromkeys(failed)),
        short=config.option.markexpr == "not wide",
        time_s=time.monotonic() - start,
        load=(load, os.getloadavg()[0]),
    )
