"""A pytest plugin with the fixture `ranks`: `ranks(2).run(function, *args)` gives a module-level function's results on two ranks.

A project opts in by `pytest_plugins = ["nemo_opt.testing.pytest_ranks"]` in its topmost conftest.py, or by
`pytest -p nemo_opt.testing.pytest_ranks`. Ranks stay warm for the whole session; those that have failed are replaced.
Tests marked `ranks` are announced by their module's text: the stack is then imported while the session still collects.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_opt.testing.ranks import RankPools, prepare

__all__ = ["ranks"]


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "ranks: starts several rank processes")


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Begin the imports of the ranks with the first module that will need them."""
    if b"pytest.mark.ranks" in module_path.read_bytes():
        prepare()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Pools of warm rank processes by size: `ranks(2).run(function, *args)`."""
    with RankPools() as pools:
        yield pools
