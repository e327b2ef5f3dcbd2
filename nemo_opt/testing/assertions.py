"""What a functional script asserted: a JSON line each, in the file that `NEMO_OPT_ASSERTIONS` names; nothing where it names none.

The suite's runner names the file and fails a script that asserted nothing, or passed although something did not hold. A comparator calls
`record` with its verdict before it acts on it; lib.sh does so by `python -m nemo_opt.testing.assertions KIND WHAT true|false`.
Loads no torch.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_opt.errors import DataError

__all__ = ["VARIABLE", "Assertion", "key_numbers", "main", "read", "record"]

VARIABLE = "NEMO_OPT_ASSERTIONS"
"""Names the file."""

_LONGEST_TEXT = 200


@dataclass(frozen=True, kw_only=True)
class Assertion:
    """One thing that was asserted."""

    kind: str
    """Who judged: check, refused, or another comparator."""
    what: str
    """What must hold, in words or as an expression."""
    holds: bool
    """Whether it did."""
    values: dict[str, Any] = field(default_factory=dict)
    """The numbers that it was judged by; plain ones only."""
    source: str = ""
    """Where they came from: the name of a result, without its ending."""


def record(kind: str, what: str, holds: bool, values: Mapping[str, Any] | None = None, *, source: str = "") -> None:
    """Adds a line. Values that are neither numbers nor short texts are given by their size."""
    if place := os.environ.get(VARIABLE):
        plain = {name: _plain(value) for name, value in (values or {}).items()}
        assertion = Assertion(kind=kind, what=what, holds=holds, values=plain, source=source)
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(assertion)) + "\n")  # one write: several processes may assert at once


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} entries"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON knows neither NaN nor infinity
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:_LONGEST_TEXT]


def read(place: Path) -> list[Assertion]:
    """The lines in `place`, in order; none where it does not exist.

    Raises:
        DataError: A line is damaged.

    """
    if not place.exists():
        return []
    try:
        return [Assertion(**json.loads(line)) for line in place.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}): nobody can say what was asserted, run the script again") from None


def key_numbers(assertions: Sequence[Assertion], most: int = 4) -> dict[str, str]:
    """A few numbers that stand for all, shortened: measured ones (fractions) before counts, a result's own before those beside it.

    Of one name, and of equal numbers, the first.
    """
    found: dict[str, int | float] = {}
    for assertion in assertions:
        found |= {name: value for name, value in assertion.values.items() if _is_number(value) and name not in found}
    texts: dict[str, str] = {}
    for name in sorted(found, key=lambda name: (not isinstance(found[name], float), "." in name)):
        text = f"{found[name]:.5g}" if isinstance(found[name], float) else str(found[name])
        if text not in texts.values():
            texts[name] = text
    return dict(list(texts.items())[:most])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main(arguments: Sequence[str]) -> int:
    """Records what a shell script judged itself: KIND WHAT true|false."""
    kind, what, holds = arguments
    record(kind, what, {"true": True, "false": False}[holds])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
