"""Comparisons on file, one JSON line each: the values of both sides of every pair, by clock. `bench compare . . --pairs FILE` appends one.

What `nemo_opt.perf.power` draws its noise from, when base and change were the same sources.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_opt.errors import DataError
from nemo_opt.perf.record import Record

__all__ = ["SCHEMA", "append_pairs", "read_pairs"]

SCHEMA = 1
"""Counts changes of the lines' form."""

_DIGITS = 5
"""Significant ones of a value: a hundredth of the noise of the quietest clock."""


def append_pairs(place: Path, base: Sequence[Record], head: Sequence[Record]) -> None:
    """Appends a comparison.

    Args:
        place: The file; it is made where it does not exist.
        base: Runs of the base, one a pair.
        head: Runs of the change, each beside the base's.

    """
    measured: dict[str, list[str]] = {}
    for figure in base[0].figures:
        if figure.kind == "time":  # counts have no noise
            measured.setdefault(figure.series.rpartition("/")[0], []).append(figure.series)
    sides = {"base": [run.by_series() for run in base], "head": [run.by_series() for run in head]}
    values = {
        name: {side: [[float(f"{run[one].value:.{_DIGITS}g}") for one in series] for run in runs] for side, runs in sides.items()}
        for name, series in measured.items()
    }
    about = {"schema": SCHEMA, "platform": base[0].platform, "started": base[0].started}
    commits = {f"{side}_commit": run.commit + "+" * run.dirty for side, run in (("base", base[0]), ("head", head[0]))}
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(about | commits | {"measurements": values}) + "\n")


def read_pairs(place: Path) -> dict[str, NDArray[np.float64]]:
    """Values of each measurement, [pairs, base and head, clocks], in order.

    Raises:
        DataError: There is no such file, a line is not a comparison, or they are of several platforms.

    """
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error}") from None
    found: dict[str, list[NDArray[np.float64]]] = {}
    platforms = set()
    for number, line in enumerate(lines, start=1):
        try:
            comparison: dict[str, Any] = json.loads(line)
            if comparison["schema"] != SCHEMA:
                raise ValueError(f"schema {comparison['schema']} != {SCHEMA}")
            platforms.add(comparison["platform"])
            for name, sides in comparison["measurements"].items():
                values = np.stack([np.asarray(sides[side], float) for side in ("base", "head")], axis=1)
                if values.ndim != 3 or not (values > 0).all():
                    raise ValueError(f"{name}: positive numbers by pair and clock are needed")
                found.setdefault(name, []).append(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}:{number}: not a comparison: {type(error).__name__}: {error}") from None
    if len(platforms) > 1:
        raise DataError(f"{place}: comparisons of several platforms, {', '.join(sorted(platforms))}: noise is of one")
    return {name: np.concatenate(parts) for name, parts in found.items()}
