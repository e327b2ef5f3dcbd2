"""Fixtures of the unit tests: warm rank processes, shared by the whole session."""

import pytest

from nemo_opt.testing import ranks as rank_pools


def pytest_pycollect_makemodule(module_path):
    """Tests with several ranks are coming: their stack is imported while this process imports its own."""
    if b"pytest.mark.ranks" in module_path.read_bytes():
        rank_pools.prepare()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(2).run(function, *args)`: the results of a module-level function on two ranks."""
    with rank_pools.RankPools() as pools:
        yield pools
