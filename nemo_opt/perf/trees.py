"""Trees of sources to measure: a commit, checked out into a worktree of its own for the time being, or a directory as it is."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.errors import ConfigError
from nemo_opt.perf.sources import Sources, sources

__all__ = ["Tree", "tree"]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Sources that can be imported."""

    name: str
    """As it was asked for."""
    root: Path
    """Holds nemo_opt/."""
    sources: Sources
    """Which they are."""


@contextmanager
def tree(name: str, repository: Path) -> Iterator[Tree]:
    """A commit of `repository`, by any name that git knows, or a directory that holds nemo_opt/.

    Raises:
        ConfigError: It is neither.

    """
    folder = Path(name)
    if (folder / "nemo_opt" / "__init__.py").exists():
        yield Tree(name=name, root=folder.resolve(), sources=sources(folder))
        return
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit is None:
        raise ConfigError(f"{name!r} is neither a commit of {repository} nor a directory with nemo_opt/ in it: see git log, or give a path")
    with tempfile.TemporaryDirectory(prefix="nemo_opt_tree_") as place:
        root = Path(place) / "tree"
        try:
            if _git(repository, "worktree", "add", "--detach", str(root), commit) is None:
                raise ConfigError(f"git cannot check out {commit} of {repository}: is it a shallow clone?")
            yield Tree(name=name, root=root, sources=sources(root))
        finally:
            _git(repository, "worktree", "remove", "--force", str(root))


def _git(repository: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
