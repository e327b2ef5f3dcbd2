"""Fixtures of the unit tests: warm rank processes, shared by the whole session; and which tests wait for the functional suite."""

import gc
import os

import pytest

from nemo_opt.testing import ranks as rank_pools

# Before torch is loaded: the matrices are small, and several threads only wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_LEFT_OUT = pytest.StashKey[int]()


def pytest_pycollect_makemodule(module_path):
    """What a test module needs before it is loaded.

    Megatron-Core decides at import whether Transformer Engine exists, so the backend comes first, in whatever order modules are collected.
    Tests with several ranks are coming: their stack is imported while this process imports its own.
    """
    source = module_path.read_bytes()
    if b"megatron" in source or b"modelopt" in source:
        import nemo_opt._stack
    if b"pytest.mark.ranks" in source:
        rank_pools.prepare()


def pytest_collection_modifyitems(config, items):
    """Tests marked `wide` run where they are asked for: by -m, by -k or by name. Else they are left to tests/functional/L2_Layouts.sh.

    They are the broad matrices of layouts: four ranks on two cores spend milliseconds on each collective.
    """
    if config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args):
        return
    wide = [item for item in items if item.get_closest_marker("wide")]
    if wide:
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if not item.get_closest_marker("wide")]
        config.stash[_LEFT_OUT] = len(wide)


def pytest_terminal_summary(terminalreporter, config):
    """Says which tests did not run, and how to run them."""
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} wide layout tests run in tests/functional/L2_Layouts.sh (here: pytest tests/unit -m wide)")


def pytest_collection_finish():
    """The stack's objects live until the end: each collection (every layout that ends does one) would visit a million of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(2).run(function, *args)`: the results of a module-level function on two ranks."""
    with rank_pools.RankPools() as pools:
        yield pools
