"""Golden numbers: what a run gave when it was recorded, and how far another machine of the same kind may be from that.

`python -m nemo_opt.testing.goldens record NAME RESULT... --keys KEY... --varied HOW` makes tests/goldens/NAME.json of repeats,
`compare NAME RESULT` holds a run against it. A result is a JSON object or a metrics.jsonl, whose numbers get the step into their name:
`loss of step 3`; `--keys` names what to keep, `loss` for all its steps, `sqnr` for all that is in it. Decisions:
- Values are kept by platform: device type, machine architecture, torch's major and minor version. One that is missing is an error.
- Both sides have the same entries: one that is missing is an error, a step too many is too.
- A repeat on one CPU gives the same bits, so repeats must vary what other machines vary: vector units, libraries' kernels, threads.
  A value may differ by `FACTOR` times the largest spread of its key, relative to the value; whole numbers not at all.
- Differences count on both sides: a loss that is better than it was is another loss.
Exit codes: 0 equal, 1 different, 2 nothing that could be compared. Loads no torch.
"""

import argparse
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median_low
from typing import Any

from nemo_opt.device import expects_gpu
from nemo_opt.errors import ConfigError, DataError, NemoOptError
from nemo_opt.testing import assertions

__all__ = [
    "FACTOR",
    "FLOOR_REL",
    "LEAST_REPEATS",
    "Entry",
    "Golden",
    "compare",
    "main",
    "platform_key",
    "read_golden",
    "read_result",
    "record",
]

FOLDER = Path("tests/goldens")
"""Where they lie, seen from the project's root."""
LEAST_REPEATS = 5
"""Fewer say too little of how far repeats lie apart."""
FACTOR = 10.0
"""Times the spread: a handful of kernels on one machine stand for those of all machines, so the true range may be several times wider."""
FLOOR_REL = 1e-5
"""Of a value, at the least: the project's goal for sums in another order in float32."""

_HOW = "record it there with tests/functional/record_goldens.sh"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number."""

    value: float
    """The median of the repeats."""
    spread: float
    """From the smallest to the largest of the repeats."""
    tolerance: float
    """What a run may differ by, in the number's own unit."""

    def __post_init__(self) -> None:
        numbers = asdict(self)
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers.values()) or self.spread < 0 or self.tolerance < 0:
            raise DataError(f"{numbers} is no golden number: all must be finite, spread and tolerance not negative")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The numbers of one platform."""

    values: dict[str, Entry]
    """By name."""
    keys: list[str]
    """What was kept of a result."""
    tolerance_origin: str
    """Where the tolerances come from, in words."""
    repeats: int
    """Runs that they were recorded from."""
    commit: str
    """The code's."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that compute."""


def platform_key() -> str:
    """Such as cpu-x86_64-torch2.13; the device is the one that ranks would choose."""
    torch = ".".join(version("torch").split(".")[:2])
    return f"{'cuda' if expects_gpu() else 'cpu'}-{platform.machine()}-torch{torch}"


def read_result(path: str | Path) -> dict[str, float]:
    """The numbers of a JSON object, nested ones by dots, or of a metrics.jsonl, by step.

    Raises:
        DataError: The file cannot be read, or holds no number.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            found = {f"{name} of step {row['step']}": n for row in rows for name, n in _numbers(row) if name != "step"}
        else:
            found = dict(_numbers(json.loads(text)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result ({type(error).__name__}: {error}): give the JSON or the metrics.jsonl of a run") from None
    if not found:
        raise DataError(f"{path} holds no number")
    return found


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names and numbers in `value`; what is no number has no golden."""
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _select(numbers: Mapping[str, float], keys: Sequence[str], source: str) -> dict[str, float]:
    selected: dict[str, float] = {}
    for key in keys:
        pattern = re.compile(re.escape(key) + r"($|\.| of step )")
        found = {name: number for name, number in numbers.items() if pattern.match(name)}
        if not found:
            raise DataError(f"{source} has no number {key!r}; there are {sorted(numbers)[:20]}")
        selected |= found
    return selected


# ------------------------------------------------------------------------------------------------------------------- recording


def record(name: str, results: Sequence[str | Path], *, keys: Sequence[str], varied: str, folder: Path = FOLDER) -> Path:
    """Write the golden of this platform, those of other platforms stay; returns the file.

    Args:
        name: Of the golden.
        results: One file a repeat.
        keys: What to keep.
        varied: What differed between the repeats, in words.
        folder: Where goldens lie.

    Raises:
        ConfigError: Too few repeats, or nothing is said of how they differed.
        DataError: A repeat lacks a number that another has, or one is not finite.

    """
    if len(results) < LEAST_REPEATS:
        raise ConfigError(f"{len(results)} repeats of {name}: at least {LEAST_REPEATS} are needed to see how far they lie apart")
    if not keys or not varied.strip():
        raise ConfigError(f"say what to keep of {name} (keys) and what differed between its repeats (varied): both go into the file")
    repeats = [_select(read_result(path), keys, str(path)) for path in results]
    for path, repeat in zip(results, repeats, strict=True):
        if one_sided := repeat.keys() ^ repeats[0].keys():
            raise DataError(f"{path} and {results[0]} do not hold the same numbers: {sorted(one_sided)[:5]}")
        if broken := [key for key, value in repeat.items() if not math.isfinite(value)]:
            raise DataError(f"{broken[0]} is {repeat[broken[0]]} in {path}: that is nothing to compare with")
    golden = Golden(
        values=_entries({key: [repeat[key] for repeat in repeats] for key in repeats[0]}),
        keys=list(keys),
        tolerance_origin=f"{FACTOR:g} times the largest relative spread of a key over {len(results)} repeats, at least {FLOOR_REL:g}; "
        f"whole numbers exactly. Repeats differed in: {varied}",
        repeats=len(results),
        commit=_commit(),
        versions=_versions(),
    )
    path = folder / f"{name}.json"
    platforms = json.loads(path.read_text())["platforms"] if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "platforms": dict(sorted((platforms | {platform_key(): asdict(golden)}).items()))}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return path


def _entries(repeats: Mapping[str, Sequence[float]]) -> dict[str, Entry]:
    spreads: dict[str, float] = {}  # by key, relative: one step's alone may be small by chance
    for name, values in repeats.items():
        if scale := max(abs(value) for value in values):
            key = _key(name)
            spreads[key] = max(spreads.get(key, 0.0), (max(values) - min(values)) / scale)
    entries = {}
    for name, values in repeats.items():
        middle = median_low(values)
        is_whole = all(isinstance(value, int) for value in values)
        rel = 0.0 if is_whole and len(set(values)) == 1 else max(FACTOR * spreads.get(_key(name), 0.0), FLOOR_REL)
        entries[name] = Entry(value=middle, spread=max(values) - min(values), tolerance=rel * abs(middle))
    return entries


def _key(name: str) -> str:
    return name.split(" of step ")[0]


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "megatron-core", "nvidia-modelopt", "numpy", "tokenizers")}


# ------------------------------------------------------------------------------------------------------------------- comparing


def read_golden(name: str, folder: Path = FOLDER) -> Golden:
    """The golden of this platform.

    Raises:
        DataError: There is none, or the file is damaged.

    """
    path = folder / f"{name}.json"
    try:
        platforms = json.loads(path.read_text())["platforms"]
        found = platforms.get(platform_key())
        golden = None if found is None else Golden(**found | {"values": {key: Entry(**entry) for key, entry in found["values"].items()}})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, NemoOptError) as error:
        raise DataError(f"{path} is no golden ({type(error).__name__}: {error}): {_HOW}") from None
    if golden is None:
        raise DataError(f"{path} knows {sorted(platforms)}, not {platform_key()}: {_HOW}")
    if not golden.values or not golden.keys or not golden.tolerance_origin or golden.repeats < LEAST_REPEATS:
        raise DataError(f"{path} holds no numbers, keys or origin of its tolerances, or fewer than {LEAST_REPEATS} repeats: {_HOW}")
    return golden


def compare(golden: Golden, result: str | Path) -> list[tuple[str, float, Entry, bool]]:
    """Name, number, golden number and whether it is near enough, of each.

    Raises:
        DataError: An entry is on one side only.

    """
    numbers = _select(read_result(result), golden.keys, str(result))
    if missing := sorted(golden.values.keys() - numbers.keys()):
        raise DataError(f"{result} lacks {missing[0]!r} (and {len(missing) - 1} more) of the golden: if that is meant, {_HOW}")
    if unknown := sorted(numbers.keys() - golden.values.keys()):
        raise DataError(f"the golden lacks {unknown[0]!r} (and {len(unknown) - 1} more) of {result}: if that is meant, {_HOW}")
    # NaN is nowhere near
    return [(name, numbers[name], entry, abs(numbers[name] - entry.value) <= entry.tolerance) for name, entry in golden.values.items()]


def _compare(name: str, result: str, folder: Path) -> int:
    golden = read_golden(name, folder)
    verdicts = compare(golden, result)
    for what, number, entry, holds in verdicts:
        assertions.record("golden", f"{what} is {entry.value!r} +- {entry.tolerance:.2g}", holds, {what: number}, source=name)
        print(f"{'ok  ' if holds else 'FAIL'} {what} = {number!r}   (golden {entry.value!r} +- {entry.tolerance:.2g})")
    if all(holds for *_, holds in verdicts):
        return 0
    here = {library: (old, _versions().get(library)) for library, old in golden.versions.items() if _versions().get(library) != old}
    moved = f"; since then changed: {', '.join(f'{library} {old} -> {new}' for library, (old, new) in here.items())}" if here else ""
    print(f"{name} was recorded at {golden.commit} on {platform_key()}{moved}. {golden.tolerance_origin}. If the change is meant, {_HOW}")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Records or compares; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.goldens", description="Golden numbers of a run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="Where goldens lie")
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="Make a golden of repeats")
    recorder.add_argument("name")
    recorder.add_argument("results", nargs="+", metavar="RESULT", help="JSON or metrics.jsonl, one for each repeat")
    recorder.add_argument("--keys", nargs="+", required=True, metavar="KEY", help="What to keep")
    recorder.add_argument("--varied", required=True, metavar="HOW", help="What differed between the repeats")
    comparer = commands.add_parser("compare", help="Hold a run against a golden")
    comparer.add_argument("name")
    comparer.add_argument("result", metavar="RESULT", help="JSON or metrics.jsonl")
    options = parser.parse_args(arguments)
    try:
        if options.command == "compare":
            return _compare(options.name, options.result, options.folder)
        print(record(options.name, options.results, keys=options.keys, varied=options.varied, folder=options.folder))
    except NemoOptError as error:
        if options.command == "compare":
            assertions.record("golden", f"{options.name} can be compared", False, {"error": str(error)}, source=options.name)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
