"""Ranks of the benchmarks: they keep freed pages, as those of the launcher do, so that algorithms are compared and not page faults."""

import os

import pytest

from nemo_opt.launch import ALLOCATOR_ENV
from nemo_opt.testing.ranks import RankPools

os.environ.update(ALLOCATOR_ENV)  # read by the fork server when it starts, at the first use of a pool


@pytest.fixture
def ranks():
    """`ranks(2).run(function, *args)`: the results of a module-level function on two ranks, in processes of this test alone."""
    with RankPools() as pools:
        yield pools
