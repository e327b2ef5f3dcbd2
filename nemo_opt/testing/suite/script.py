"""A functional script and its header, the only source of the matrix: `# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@x`.

Optional are `layout=TP2PP1` (else it is read from the script's name) and `memory=GiB`. A script in `quarantine/` also says `issue=` and
`expires=YYYY-MM-DD`. Whatever could be left out in silence is an error here, and so of every run: a script without a header, one whose
name is none of a script's, two of one name, one that bash cannot read, one that a failing command does not end, an expired quarantine.
"""

import datetime as dt
import math
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opt.errors import ConfigError

__all__ = ["LONGEST_QUARANTINE_DAYS", "Script", "discover", "select"]

LONGEST_QUARANTINE_DAYS = 90
"""A date further away is no date."""

_REQUIRED = ("tier", "ranks", "timeout", "device", "needs", "owner")
_OPTIONAL = ("layout", "memory")
_QUARANTINE = ("issue", "expires")
_DEVICES = ("any", "cpu", "cuda")
_LIB = "lib.sh"
_NAME = re.compile(r"L[0-2]_\w+")
_MEANT = re.compile(r"[Ll]\d")
"""Begins the name of what is meant to be a script; other files are helpers and tools, unless they have a header."""
_HEADER = re.compile(r"^# tier=", re.MULTILINE)
_LAYOUT = re.compile(r"(?:(?:TP|PP|VP|CP|EP|DP)\d+)+")
_NEEDS = ("fixtures", "namespaces", "none")
_EXAMPLE = "# tier=L2 ranks=2 timeout=600 device=any needs=none owner=@x"
_SOURCED = re.compile(r"^\s*(?:source|\.)\s.*?([\w.]+\.sh)\b", re.MULTILINE)
_LETS_FAIL = re.compile(r"^\s*set\s+(?:\+\w*e|\+o\s+errexit)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A functional script and what its header says."""

    path: Path
    """The file."""
    tier: str
    """L0, L1 or L2."""
    ranks: int
    """Ranks it starts at a time, at most."""
    timeout_s: int
    """Time limit of the whole script."""
    device: str
    """any, cpu or cuda."""
    needs: tuple[str, ...]
    """What must be there before: fixtures, or none."""
    owner: str
    """Whom to ask."""
    layout: str = ""
    """Such as TP2PP1; empty where it is about none, or many."""
    memory_gib: float = 0.0
    """What it needs at most; 0 where the header does not say."""
    issue: str = ""
    """Of a quarantined script: where its fault is described."""
    expires: dt.date | None = None
    """Of a quarantined script: the last day of its quarantine."""

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.path.stem

    @property
    def quarantined(self) -> bool:
        """Whether its verdict is reported without counting."""
        return self.expires is not None

    def row(self) -> dict[str, Any]:
        """What a job matrix needs, as plain values."""
        quarantine = {"issue": self.issue, "expires": str(self.expires)} if self.quarantined else None
        row = {"name": self.name, "tier": self.tier, "layout": self.layout, "ranks": self.ranks, "timeout": self.timeout_s}
        row |= {"device": self.device, "needs": list(self.needs), "owner": self.owner, "memory": self.memory_gib or None}
        return row | {"quarantine": quarantine}


def discover(folder: Path, today: dt.date | None = None) -> list[Script]:
    """All scripts of `folder` and its `quarantine`, by name.

    Args:
        folder: Where scripts `L<n>_*.sh` lie, and what they source.
        today: What a quarantine's date is compared with; the day it is by default.

    Raises:
        ConfigError: There are none, or some are not what a script must be; all of these are named.

    """
    paths = [file for file in sorted(folder.glob("*.sh")) if _MEANT.match(file.stem) or _HEADER.search(file.read_text())]
    paths += sorted((folder / "quarantine").glob("*.sh"))
    if not paths:
        raise ConfigError(f"{folder} holds no functional script (L0_*.sh, L1_*.sh, L2_*.sh): name the right folder")
    scripts: dict[str, Script] = {}
    faults = []
    for path in paths:
        try:
            script = _parse(path, quarantined=path.parent != folder, today=today or dt.date.today())
            if script.name in scripts:
                raise ConfigError(f"{path} has the name of {scripts[script.name].path}: rename one")
            scripts[script.name] = script
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return [scripts[name] for name in sorted(scripts)]


def select(
    scripts: Sequence[Script],
    *,
    tier: str | None = None,
    layout: str | None = None,
    only: Sequence[str] = (),
    device: str | None = None,
    quarantined: bool = False,
) -> list[Script]:
    """Scripts of `tier` and `layout`, for `device`, whose name contains one of `only`; quarantined ones only where they are wanted.

    Raises:
        ConfigError: Nothing remains.

    """
    if device not in (None, *_DEVICES[1:]):
        raise ConfigError(f"device {device!r} is unknown; it is cpu or cuda")

    def chosen(script: Script) -> bool:
        return (
            tier in (None, script.tier)
            and layout in (None, script.layout)
            and (device is None or script.device in ("any", device))
            and (not only or any(word in script.name for word in only))
            and (quarantined or not script.quarantined)
        )

    if found := [script for script in scripts if chosen(script)]:
        return found
    wanted = {"tier": tier, "layout": layout, "device": device, "names": list(only) or None}
    words = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None) or "default"
    there = ", ".join(f"{s.name}{' (quarantined)' if s.quarantined else ''}" for s in scripts)
    raise ConfigError(f"no script selected by {words}; there are {there}")


# ---------------------------------------------------------------------------------------------------------------- one script


def _parse(path: Path, *, quarantined: bool, today: dt.date) -> Script:
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(f"{path} is meant to be a script, but its name is not of the form L2_Name.sh: rename it, or remove it from here")
    text = path.read_text()
    _check_text(path, text)
    words = _header(path, text, (*_REQUIRED, *_QUARANTINE) if quarantined else _REQUIRED)
    _check_words(path, words)
    ranks = int(words["ranks"])
    return Script(
        path=path,
        tier=words["tier"],
        ranks=ranks,
        timeout_s=int(words["timeout"]),
        device=words["device"],
        needs=tuple(need for need in words["needs"].split(",") if need != "none"),
        owner=words["owner"],
        layout=_layout(path, words.get("layout", ""), ranks),
        memory_gib=float(words.get("memory", 0)),
        issue=words.get("issue", ""),
        expires=_expiry(path, words["expires"], today) if quarantined else None,
    )


def _check_text(path: Path, text: str) -> None:
    """What makes a script's exit code mean something."""
    if _LIB not in _SOURCED.findall(text):
        raise ConfigError(f"{path} does not source {_LIB}, which ends a script at the first command that fails: source it")
    if _LETS_FAIL.search(text):
        raise ConfigError(f"{path} lets commands fail unseen (set +e): write `|| code=$?` where a failure is meant")
    if (done := subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)).returncode:
        raise ConfigError(f"{path} cannot be read by bash: {done.stderr.strip()}")


def _header(path: Path, text: str, required: Sequence[str]) -> dict[str, str]:
    lines = [line for line in text.splitlines()[:10] if _HEADER.match(line)]
    if len(lines) != 1:
        raise ConfigError(f"{path} needs one header line such as {_EXAMPLE!r}")
    words = dict(word.split("=", 1) for word in shlex.split(lines[0][2:]) if "=" in word)
    if missing := [key for key in required if not words.get(key)]:
        raise ConfigError(f"{path}: the header lacks {', '.join(missing)}")
    if unknown := sorted(words.keys() - {*required, *_OPTIONAL}):
        where = "; issue and expires belong to scripts in quarantine/" if set(unknown) & set(_QUARANTINE) else ""
        raise ConfigError(f"{path}: the header has unknown keys {unknown}; known are {[*required, *_OPTIONAL]}{where}")
    return words


def _check_words(path: Path, words: dict[str, str]) -> None:
    if not path.name.startswith(words["tier"] + "_"):
        raise ConfigError(f"{path}: tier {words['tier']} does not agree with the file's name")
    if words["device"] not in _DEVICES:
        raise ConfigError(f"{path}: device {words['device']!r} is none of {list(_DEVICES)}")
    for key in ("ranks", "timeout"):
        if not words[key].isdigit() or int(words[key]) < 1:
            raise ConfigError(f"{path}: {key} {words[key]!r} is not a positive number")
    if not re.fullmatch(r"\d+(\.\d+)?", words.get("memory", "0")):
        raise ConfigError(f"{path}: memory {words['memory']!r} is not a number of GiB")
    if wrong := [need for need in words["needs"].split(",") if need not in _NEEDS]:
        raise ConfigError(f"{path}: needs {wrong} is unknown; known are {', '.join(_NEEDS)}")


def _layout(path: Path, said: str, ranks: int) -> str:
    """The layout that the header or the name says; it must fit the ranks."""
    named = [part for part in path.stem.split("_") if _LAYOUT.fullmatch(part)]
    if said and not _LAYOUT.fullmatch(said):
        raise ConfigError(f"{path}: layout {said!r} is none; write it as TP2PP1")
    if len(named) > 1 or (said and named and named != [said]):
        raise ConfigError(f"{path}: which layout is it, {' or '.join([*named, *([said] if said else [])])}? Name one")
    layout = said or "".join(named)
    sizes = {axis: int(size) for axis, size in re.findall(r"([A-Z]+)(\d+)", layout)}
    taken = math.prod(sizes.get(axis, 1) for axis in ("TP", "PP", "CP", "DP"))
    if taken > ranks:
        raise ConfigError(f"{path}: layout {layout} takes {taken} ranks, but the header says ranks={ranks}")
    return layout


def _expiry(path: Path, said: str, today: dt.date) -> dt.date:
    try:
        expires = dt.date.fromisoformat(said)
    except ValueError:
        raise ConfigError(f"{path}: expires {said!r} is no date; write it as YYYY-MM-DD") from None
    if expires < today:
        raise ConfigError(f"{path}: its quarantine expired on {expires}: mend it and move it back, or decide anew in its issue")
    if expires > today + dt.timedelta(days=LONGEST_QUARANTINE_DAYS):
        raise ConfigError(f"{path}: expires {expires} is more than {LONGEST_QUARANTINE_DAYS} days away: a quarantine is no home")
    return expires
