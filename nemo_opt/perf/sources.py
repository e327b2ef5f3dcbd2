"""Which sources a run measured."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sources", "sources"]

_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Sources:
    """A state of a repository."""

    commit: str
    """Forty hexadecimal digits; empty where there is no repository."""
    dirty: bool
    """Whether files that count differ from it."""
    subject: str
    """The commit's first line."""


def sources(root: Path) -> Sources:
    """Of the repository at `root`. Records under benchmarks/history do not make it dirty: they are what a run leaves."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return Sources(commit="", dirty=False, subject="")
    status = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/history")
    return Sources(commit=commit, dirty=bool(status), subject=_git(root, "log", "-1", "--format=%s"))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
