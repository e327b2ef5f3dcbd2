"""Found by every Python process under `python -m nemo_opt.cpu`, spawned ones too, through PYTHONPATH.

Activates the CPU backend right after the process has imported torch, so that a process without torch pays nothing, and runs the
sitecustomize that this file hides, if there is one.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch through the other finders and activates the backend once torch is executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _ActivatingLoader(spec.loader)
        return spec


class _ActivatingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        from nemo_opt import cpu

        cpu.activate()


def _run_hidden_sitecustomize() -> None:
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(_HERE).resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_hidden_sitecustomize()
if importlib.util.find_spec("nemo_opt") is None:  # run from a source tree without an installation
    sys.path.append(str(Path(__file__).parents[3]))
sys.meta_path.insert(0, _AfterTorch())
