"""The register of changes to other people's code, each under the name of its target and with its reason.

Three decisions:

* A patch is applied when its module is loaded, by an import hook, so that activating the backend imports neither Megatron-Core nor
  ModelOpt. Modules that are loaded already are patched at once.
* Where upstream merely asks "is this a CUDA tensor?", the question is re-aimed inside that one function (`retarget`): constants and
  attribute names of its code object are exchanged in place. `Tensor.is_cuda` and `Tensor.type()` keep telling the truth everywhere
  else, and references that other modules already hold see the change. A whole function that is registered elsewhere (as an operator's
  implementation, say) gets another body the same way (`rewrite`).
* A target that is gone, or no longer holds what the patch expects, raises `UpstreamMovedError` with the target's name. That a target's
  source file exists is checked at activation; what is inside is checked when the module is loaded, or for all at once by `apply_all`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from nemo_opt.errors import UpstreamMovedError

__all__ = ["Patch", "apply_all", "install", "registered", "replace", "retarget", "rewrite", "set_attribute", "set_functions", "when_loaded"]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change of one target."""

    target: str
    """"package.module:qualified.name"."""
    reason: str
    """Why the CPU backend cannot do without it."""
    apply: Callable[[ModuleType], None] = field(repr=False)
    """Called with the module once it is loaded."""

    @property
    def module(self) -> str:
        """The module's dotted name."""
        return self.target.partition(":")[0]


_patches: dict[str, list[Patch]] = {}
_applied: set[int] = set()


def registered() -> tuple[Patch, ...]:
    """Every patch, in the order of registration."""
    return tuple(patch for patches in _patches.values() for patch in patches)


def set_attribute(owner: object, name: str, value: object) -> None:
    """Replaces an attribute that must exist.

    Raises:
        UpstreamMovedError: The owner has no such attribute.
    """
    if not hasattr(owner, name):
        raise UpstreamMovedError(f"{getattr(owner, '__name__', owner)!s}.{name} is gone; the CPU backend replaces it")
    setattr(owner, name, value)


def set_functions(owner: Any, functions: Mapping[str, Any]) -> None:
    """Replaces several attributes of a module, each function by a copy of its own.

    TorchDynamo keeps a rule for each name and refuses to work if one object stands under two of them.
    """
    for name, value in functions.items():
        if isinstance(value, FunctionType):
            copied = FunctionType(value.__code__, value.__globals__, name, value.__defaults__, value.__closure__)
            copied.__kwdefaults__, copied.__doc__ = value.__kwdefaults__, value.__doc__
            value = copied
        set_attribute(owner, name, value)


def when_loaded(target: str, *, reason: str) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Registers a function that is called with the target's module once that is loaded."""

    def register(apply: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        patch = Patch(target=target, reason=reason, apply=apply)
        _patches.setdefault(patch.module, []).append(patch)
        return apply

    return register


def replace(target: str, *, reason: str, parameters: Sequence[str] | None = None) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Registers `make_replacement(original) -> replacement` for a function or a class attribute.

    Args:
        target: "package.module:qualified.name".
        reason: Why the CPU backend cannot do without it.
        parameters: The original's parameter names, checked when the patch is applied, where the replacement depends on them.
    """

    def register(make_replacement: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @when_loaded(target, reason=reason)
        def apply(module: ModuleType) -> None:
            owner, name, original = _resolve(module, target)
            if parameters is not None:
                _check_parameters(target, original, parameters)
            setattr(owner, name, make_replacement(original))

        return make_replacement

    return register


def retarget(target: str, *, reason: str, constants: Mapping[str, str] | None = None, names: Mapping[str, str] | None = None) -> None:
    """Registers an exchange of string constants and attribute names inside one function.

    Args:
        target: "package.module:qualified.name" of a Python function; decorators that keep `__wrapped__` are looked through.
        reason: Why the CPU backend cannot do without it.
        constants: Old string constant -> new one.
        names: Old attribute or global name -> new one.
    """

    @when_loaded(target, reason=reason)
    def apply(module: ModuleType) -> None:
        function = _resolve(module, target)[2]
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if not isinstance(function, FunctionType):
            raise UpstreamMovedError(f"{target} is no Python function any more but {type(function).__name__}; it was to be retargeted")
        found: set[str] = set()
        code = _exchange(function.__code__, dict(constants or {}), dict(names or {}), found)
        missing = [key for key in [*(constants or {}), *(names or {})] if key not in found]
        if missing:
            raise UpstreamMovedError(f"{target} no longer mentions {missing}; this patch is stale. It was there because: {reason}")
        function.__code__ = code


def rewrite(target: str, *, reason: str) -> Callable[[Any], Any]:
    """Registers a function whose body becomes the target's, for whoever holds the target already.

    The body runs with the target's globals, so it imports what it needs itself. The parameters must be the target's, by name.

    Args:
        target: "package.module:qualified.name" of a Python function without closure.
        reason: Why the CPU backend cannot do without it.
    """

    def register(body: Any) -> Any:
        code = body.__code__
        if code.co_freevars:
            raise ValueError(f"{body.__qualname__} refers to {code.co_freevars} around it, which {target} cannot see")

        @when_loaded(target, reason=reason)
        def apply(module: ModuleType) -> None:
            original = _resolve(module, target)[2]
            _check_parameters(target, original, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            if not isinstance(original, FunctionType) or original.__closure__:
                raise UpstreamMovedError(f"{target} is no plain Python function any more; its body was to be exchanged")
            original.__code__ = code

        return body

    return register


def install() -> None:
    """Applies what can be applied, and hooks the import of the rest.

    Raises:
        UpstreamMovedError: A target's module does not exist in the installed package, or an applied patch found its target changed.
    """
    for name in _patches:
        _require_source(name)
    for name in list(_patches):
        if name in sys.modules:
            _apply_module(sys.modules[name])
    if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())


def apply_all() -> None:
    """Imports the module of every patch, which applies it.

    Raises:
        UpstreamMovedError: A target is gone or changed.
    """
    for name in list(_patches):
        importlib.import_module(name)


def _apply_module(module: ModuleType) -> None:
    for patch in _patches.get(module.__name__, ()):
        if id(patch) not in _applied:
            patch.apply(module)
            _applied.add(id(patch))


def _resolve(module: ModuleType, target: str) -> tuple[Any, str, Any]:
    """The owner, the attribute's name and its value as stored (so that static methods and descriptors stay visible)."""
    owner: Any = module
    *path, name = target.partition(":")[2].split(".")
    try:
        for part in path:
            owner = getattr(owner, part)
        value = owner.__dict__[name]
    except (AttributeError, KeyError):
        raise UpstreamMovedError(f"{target} is gone; the CPU backend patches it") from None
    return owner, name, value


def _check_parameters(target: str, original: Any, parameters: Sequence[str]) -> None:
    function = getattr(original, "__func__", original)
    code = getattr(function, "__code__", None)
    found = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
    if tuple(found) != tuple(parameters):
        raise UpstreamMovedError(f"{target} now takes {tuple(found)}, the patch was written for {tuple(parameters)}")


def _exchange(code: CodeType, constants: dict[str, str], names: dict[str, str], found: set[str]) -> CodeType:
    """The code object with constants and names exchanged, in nested functions too."""

    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _exchange(value, constants, names, found)
        if isinstance(value, tuple | frozenset):
            return type(value)(constant(item) for item in value)
        if isinstance(value, str) and value in constants:
            found.add(value)
            return constants[value]
        return value

    def name(value: str) -> str:
        if value in names:
            found.add(value)
        return names.get(value, value)

    return code.replace(co_consts=tuple(map(constant, code.co_consts)), co_names=tuple(map(name, code.co_names)))


def _require_source(module: str) -> None:
    """Checks by name that a module exists, without importing its parents."""
    if module in sys.modules:
        return
    top, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top)
    if spec is None or spec.submodule_search_locations is None:
        return  # the package is not installed: nothing to patch
    roots = [Path(root, *rest) for root in spec.submodule_search_locations]
    if not any(root.with_suffix(".py").is_file() or (root / "__init__.py").is_file() for root in roots):
        raise UpstreamMovedError(f"{module} is gone; the CPU backend patches {[patch.target for patch in _patches[module]]}")


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds patched modules through the other finders and appends the patches to their execution."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in _patches:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader)
                return spec
        return None


class _PatchingLoader(importlib.abc.Loader):
    """Executes a module with its own loader, then patches it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _apply_module(module)
