"""Makers of figures and records that the tests of judging share; of session scope, so that hypothesis may use them."""

import pytest

from nemo_opt.perf.record import Figure, Record


def _figure(value, metric="time", **more):
    return Figure(bench="step", case="TP1PP2", metric=metric, value=value, **more)


def _run(number, *figures, **more):
    """The run of an hour; `number` orders it and makes its commit."""
    facts = {
        "started": f"202601{number // 24 + 1:02d}T{number % 24:02d}0000Z",
        "commit": f"{0xABC0000 + number:07x}" + "0" * 33,
        "platform": "here",
        "run_id": f"{number:08x}",
    }
    return Record(figures=figures, **(facts | more))


@pytest.fixture(scope="session")
def figure():
    """`figure(1.5, "time", kind="time")`."""
    return _figure


@pytest.fixture(scope="session")
def run():
    """`run(3, figure(1.5), environment={"torch": "2.13"})`."""
    return _run
