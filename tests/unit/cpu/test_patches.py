"""The register of patches: what it changes, and that it refuses what has moved."""

import importlib
import sys

import pytest

from nemo_opt.cpu import patches
from nemo_opt.errors import UpstreamMovedError

UPSTREAM = '''
import functools

class Holder:
    @staticmethod
    def made(size):
        return size

def double(size):
    return 2 * size

def kind(tensor):
    """Asks in three ways."""
    def nested():
        return tensor.is_cuda
    return tensor.type in ["cuda.Float", "cuda.Half"], nested(), "cuda.Float"

def decorate(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

@decorate
def wrapped(tensor):
    return tensor.is_cuda
'''


class Tensor:
    type = "Float"
    is_cuda = False
    is_cpu = True


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A package `upstream_package.sites` that can be imported, beside an empty register."""
    monkeypatch.setattr(patches, "_patches", {})
    monkeypatch.setattr(patches, "_applied", set())
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, patches._PatchingFinder)])
    package = tmp_path / "upstream_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sites.py").write_text(UPSTREAM)
    monkeypatch.syspath_prepend(tmp_path)
    yield "upstream_package.sites"
    for name in [name for name in sys.modules if name.startswith("upstream_package")]:
        del sys.modules[name]


def test_replacement_waits_for_the_import(upstream):
    patches.replace(f"{upstream}:double", reason="test", parameters=("size",))(lambda original: lambda size: original(size) + 1)
    patches.install()
    assert upstream not in sys.modules
    assert importlib.import_module(upstream).double(3) == 7


def test_replacement_of_a_loaded_module_is_immediate_and_happens_once(upstream):
    module = importlib.import_module(upstream)
    patches.replace(f"{upstream}:double", reason="test")(lambda original: lambda size: original(size) + 1)
    patches.install()
    patches.install()
    assert module.double(3) == 7


def test_class_attributes_arrive_as_they_are_stored(upstream):
    patches.replace(f"{upstream}:Holder.made", reason="test", parameters=("size",))(
        lambda original: staticmethod(lambda size: original.__func__(size) * 10)
    )
    patches.apply_all()
    patches.install()
    assert importlib.import_module(upstream).Holder.made(2) == 20


def test_retargeting_exchanges_constants_and_names_in_nested_code_and_held_references(upstream):
    kind = importlib.import_module(upstream).kind
    assert kind(Tensor) == (False, False, "cuda.Float")
    patches.retarget(f"{upstream}:kind", reason="test", constants={"cuda.Float": "Float"}, names={"is_cuda": "is_cpu"})
    patches.install()
    assert kind(Tensor) == (True, True, "Float")


def test_rewritten_function_is_changed_for_those_who_hold_it_too(upstream):
    held = importlib.import_module(upstream).double

    @patches.rewrite(f"{upstream}:double", reason="test")
    def double(size):
        return functools.reduce(int.__add__, [size] * 3)  # noqa: F821 (the target's globals)

    patches.install()
    assert held(2) == 6


def test_rewriting_refuses_what_cannot_work(upstream):
    around = 3
    with pytest.raises(ValueError, match=r"refers to \('around',\)"):
        patches.rewrite(f"{upstream}:double", reason="test")(lambda size: size * around)


def test_retargeting_looks_through_decorators(upstream):
    patches.retarget(f"{upstream}:wrapped", reason="test", names={"is_cuda": "is_cpu"})
    patches.install()
    assert importlib.import_module(upstream).wrapped(Tensor) is True


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda site: patches.replace(f"{site}:gone", reason="test")(lambda original: original), r":gone is gone"),
        (lambda site: patches.replace(f"{site}:Holder.gone", reason="test")(lambda original: original), r"Holder.gone is gone"),
        (lambda site: patches.replace(f"{site}:double", reason="test", parameters=("n",))(lambda o: o), r":double now takes \('size',\)"),
        (
            lambda site: patches.retarget(f"{site}:kind", reason="the cause", constants={"xpu": "cpu"}),
            r"no longer mentions \['xpu'\].*the cause",
        ),
        (lambda site: patches.retarget(f"{site}:Holder", reason="test", names={"a": "b"}), r":Holder is no Python function"),
        (lambda site: patches.rewrite(f"{site}:double", reason="test")(lambda n: n), r":double now takes \('size',\)"),
        (lambda site: patches.rewrite(f"{site}:Holder", reason="test")(lambda: None), r":Holder is no plain Python function"),
    ],
)
def test_moved_target_is_named_when_its_module_is_loaded(upstream, register, message):
    register(upstream)
    patches.install()
    with pytest.raises(UpstreamMovedError, match=message):
        importlib.import_module(upstream)


def test_missing_module_is_named_at_activation_without_importing_the_package(upstream):
    patches.retarget("upstream_package.renamed:kind", reason="test", names={"a": "b"})
    with pytest.raises(UpstreamMovedError, match=r"upstream_package.renamed is gone.*renamed:kind"):
        patches.install()
    assert "upstream_package" not in sys.modules


def test_package_that_is_not_installed_needs_no_patch(upstream):
    patches.retarget("no_such_package.module:kind", reason="test", names={"a": "b"})
    patches.install()


def test_attribute_that_is_gone_is_named():
    with pytest.raises(UpstreamMovedError, match=r"Tensor.gone is gone"):
        patches.set_attribute(Tensor, "gone", None)


def test_functions_are_set_as_separate_objects(monkeypatch):
    def answer(question=None, *, loud=False):
        return loud

    class Owner:
        one = two = None

    patches.set_functions(Owner, {"one": answer, "two": answer})
    assert Owner.one is not Owner.two
    assert Owner.one(loud=True) is True
    assert Owner.two() is False
