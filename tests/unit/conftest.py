"""What all unit tests share: the fixture `ranks`, the backend before the stack; and which tests wait for the functional suite."""

import gc
import os

import pytest

# Before torch is loaded: the matrices are small, and several threads only wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config):
    """The fixture `ranks`. Not by `pytest_plugins`, which pytest takes from the topmost folder only: `pytest tests` would fail."""
    config.pluginmanager.import_plugin("nemo_opt.testing.pytest_ranks")


def pytest_pycollect_makemodule(module_path):
    """Megatron-Core decides at import whether Transformer Engine exists: the backend comes first, however modules are ordered."""
    source = module_path.read_bytes()
    if b"megatron" in source or b"modelopt" in source:
        import nemo_opt._stack


def pytest_collection_modifyitems(config, items):
    """Tests marked `wide` run where they are asked for: by -m, by -k or by name. Else they are left to tests/functional/L2_Layouts.sh.

    They are the broad matrices of layouts (four ranks on two cores spend milliseconds on each collective) and whole commands on two ranks.
    """
    if config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args):
        return
    wide = [item for item in items if item.get_closest_marker("wide")]
    if wide:
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if not item.get_closest_marker("wide")]
        config.stash[_LEFT_OUT] = len(wide)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells what it left out: its parent collects nothing."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    """The parent hears of it; every worker collects the same."""
    if hasattr(node, "workeroutput"):
        node.config.stash[_LEFT_OUT] = node.workeroutput["left_out"]


def pytest_terminal_summary(terminalreporter, config):
    """Says which tests did not run, and how to run them."""
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} wide tests are left to tests/functional/L2_Layouts.sh (here: pytest tests/unit -m wide)")


def pytest_collection_finish():
    """The stack's objects live until the end: each collection (every layout that ends does one) would visit a million of them."""
    gc.collect()
    gc.freeze()
