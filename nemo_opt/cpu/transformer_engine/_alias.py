"""Makes `transformer_engine` an alias of this package for the import system.

One finder at the front of `sys.meta_path` answers for `transformer_engine`, `transformer_engine.*` and `transformer_engine_torch` with the
modules of this package themselves, so a class has one identity under both names.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from nemo_opt.errors import UpstreamMovedError

__all__ = ["install", "is_installed"]

_PACKAGE = "nemo_opt.cpu.transformer_engine"
_ROOTS = {"transformer_engine": _PACKAGE, "transformer_engine_torch": f"{_PACKAGE}.extension"}


def _real_name(name: str) -> str | None:
    """The module of this package behind an aliased name, or None for a foreign name."""
    root, dot, rest = name.partition(".")
    return _ROOTS[root] + dot + rest if root in _ROOTS else None


class _AliasLoader(Loader):
    """Hands out an existing module; importlib overwrites `__spec__` with the alias's, so it is put back."""

    def __init__(self, real_name: str) -> None:
        self._real_name = real_name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _AliasFinder(MetaPathFinder):
    """Finds the aliased names and nothing else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        real_name = _real_name(fullname)
        if real_name is None or importlib.util.find_spec(real_name) is None:
            return None
        return ModuleSpec(fullname, _AliasLoader(real_name), is_package=True)


def is_installed() -> bool:
    """Whether `transformer_engine` is this reference in this process."""
    return any(isinstance(finder, _AliasFinder) for finder in sys.meta_path)


def install() -> None:
    """Make `import transformer_engine` give this reference. Idempotent; must run before megatron or modelopt is imported.

    Raises:
        UpstreamMovedError: another Transformer Engine is loaded already.
    """
    if is_installed():
        return
    loaded = sys.modules.get("transformer_engine")
    if loaded is not None:
        raise UpstreamMovedError(
            f"transformer_engine is already imported from {getattr(loaded, '__file__', 'an unknown place')}, so the CPU reference cannot "
            f"take its name. Activate the CPU backend before importing transformer_engine, or run with NEMO_OPT_DEVICE=cuda."
        )
    sys.meta_path.insert(0, _AliasFinder())
    # The real package loads both on import, and callers rely on `te.pytorch` and `te.common` being attributes.
    importlib.import_module("transformer_engine.common.recipe")
    importlib.import_module("transformer_engine.pytorch")
