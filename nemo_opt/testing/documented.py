"""Runs the commands of a Markdown page and compares what they print with what the page shows.

Blocks marked `bash` run in order in one shell, as a reader would type them; the first that fails ends it. A block marked `text` that
follows is what the one before it prints, with `...` for whatever may differ, and spaces and line ends not compared.

Example: `python -m nemo_opt.testing.documented docs/harness.md`
"""

import argparse
import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.errors import DataError
from nemo_opt.testing.assertions import record

__all__ = ["Command", "commands", "main", "run"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES = ("bash", "text", "python", "yaml")


@dataclass(frozen=True)
class Command:
    """A block of a page."""

    code: str
    """What to run."""
    line: int
    """Where it begins."""
    shown: str | None
    """What it prints, according to the page."""


def commands(page: str) -> list[Command]:
    """The blocks to run, with what must come out.

    Raises:
        DataError: There are none; a block has no language; or an output follows no command.

    """
    found: list[Command] = []
    previous_end = -1
    for match in _FENCE.finditer(page):
        language, text = match.groups()
        line = page.count("\n", 0, match.start()) + 1
        if language not in _LANGUAGES:
            raise DataError(f"line {line}: a block of language {language!r}, which is none of {', '.join(_LANGUAGES)}")
        if language == "bash":
            found.append(Command(text, line, None))
        elif language == "text":
            if not found or page[previous_end : match.start()].strip():
                raise DataError(f"line {line}: an output that follows no command")
            found[-1] = Command(found[-1].code, found[-1].line, text)
        previous_end = match.end()
    if not found:
        raise DataError("no block marked bash: nothing to run")
    return found


def run(blocks: Sequence[Command]) -> list[str]:
    """Runs them in one shell, here, and says what is wrong with which; each is recorded as asserted."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(number) for number in range(len(blocks))]
        parts = [f"exec >'{output}' 2>&1\n{block.code}" for block, output in zip(blocks, outputs, strict=True)]
        script = Path(folder) / "script"
        script.write_text("\n".join(["set -euo pipefail", *parts]), encoding="utf-8")
        # A terminal's width would cut tables, at another place for each reader.
        code = subprocess.run(["bash", script], env=os.environ | {"COLUMNS": "200"}, stdin=subprocess.DEVNULL, check=False).returncode
        ran = [output for output in outputs if output.exists()]
        said = [output.read_text(errors="replace") for output in ran]
    return _faults(blocks, said, code)


def _faults(blocks: Sequence[Command], said: Sequence[str], code: int) -> list[str]:
    faults = []
    for number, block in enumerate(blocks):
        fault = ""
        if number >= len(said):
            fault = "was not reached"
        elif code and number == len(said) - 1:
            fault = f"ended with exit code {code}, after printing:\n{said[number]}"
        elif block.shown is not None and not _matches(block.shown, said[number]):
            fault = f"does not print what the page shows:\n{block.shown}--- but:\n{said[number]}"
        record("documented", block.code.strip().splitlines()[0], not fault)
        if fault:
            faults.append(f"line {block.line}: {block.code.strip().splitlines()[0]}\n  {fault}")
    return faults


def _matches(shown: str, said: str) -> bool:
    return doctest.OutputChecker().check_output(shown, said, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def main(arguments: Sequence[str]) -> int:
    """Runs a page: 0 if all of it is true, 1 if not, 2 if it is no such page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="such as docs/harness.md")
    page = parser.parse_args(arguments).page
    try:
        blocks = commands(page.read_text(encoding="utf-8"))
    except (OSError, DataError) as error:
        print(f"{page}: {error}", file=sys.stderr)
        return 2
    faults = run(blocks)
    for fault in faults:
        print(f"{page}, {fault}", file=sys.stderr)
    print(f"{page}: {len(blocks) - len(faults)} of {len(blocks)} blocks do what the page says")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
