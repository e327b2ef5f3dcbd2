"""What benchmarks share: the fixtures `ranks` and `figure`.

Their ranks keep freed pages, as those of the launcher do, so that algorithms are compared and not page faults.
"""

import os

import pytest

from nemo_opt.launch import ALLOCATOR_ENV
from nemo_opt.testing.ranks import RankPools

pytest.register_assert_rewrite("nemo_opt.perf.pytest_figures")

from nemo_opt.perf import pytest_figures  # noqa: E402 - after that line, or pytest warns

os.environ.update(ALLOCATOR_ENV)  # read by the fork server when it starts, at the first use of a pool


def pytest_addoption(parser):
    pytest_figures.add_options(parser)


def pytest_configure(config):
    """The fixture `figure`, and the table at the end."""
    config.pluginmanager.import_plugin("nemo_opt.perf.pytest_figures")


@pytest.fixture
def ranks():
    """`ranks(2).run(function, *args)`: the results of a module-level function on two ranks, in processes of this test alone."""
    with RankPools() as pools:
        yield pools
