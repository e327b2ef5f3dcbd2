"""`transformer_engine` is this package under another name, and nothing more."""

import importlib
import importlib.util
import pkgutil
import sys
import types

import nemo_opt._stack

import pytest
import transformer_engine
import transformer_engine.pytorch.module.linear as aliased_linear

from nemo_opt.cpu import transformer_engine as reference
from nemo_opt.cpu.transformer_engine import _alias
from nemo_opt.cpu.transformer_engine.pytorch.module import linear
from nemo_opt.errors import UpstreamMovedError


def test_modules_are_the_same_objects():
    assert transformer_engine is reference
    assert aliased_linear is linear
    assert linear.__spec__.name == "nemo_opt.cpu.transformer_engine.pytorch.module.linear"
    assert transformer_engine.pytorch.Linear is linear.Linear
    assert transformer_engine.common.recipe.DelayedScaling().delayed()


def test_what_is_not_here_is_not_importable():
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine.pytorch.optimizers")
    assert importlib.util.find_spec("transformer_engine.jax") is None
    assert importlib.util.find_spec("transformer_engine_jax") is None


def test_install_twice_is_one_finder():
    before = list(sys.meta_path)
    reference.install()
    assert sys.meta_path == before
    assert reference.is_installed()


def test_another_transformer_engine_is_not_replaced(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _alias._AliasFinder)])
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    with pytest.raises(UpstreamMovedError, match="already imported"):
        reference.install()
    assert not reference.is_installed()


def _all_modules():
    return [name for _, name, _ in pkgutil.walk_packages(reference.__path__, f"{reference.__name__}.")]


@pytest.mark.parametrize("name", _all_modules())
def test_exported_names_exist(name):
    module = importlib.import_module(name)
    assert all(hasattr(module, exported) for exported in getattr(module, "__all__", []))


def test_the_reference_needs_neither_megatron_nor_modelopt():
    for name in _all_modules():
        loaded = vars(importlib.import_module(name)).values()
        names = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in loaded}
        assert not [n for n in names if isinstance(n, str) and n.split(".")[0] in {"megatron", "modelopt"}]
