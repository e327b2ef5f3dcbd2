"""Whether every measured process left its data: `python ci/coverage_data.py FOLDER`, which `ci/coverage.sh` calls.

FOLDER holds the data files and, in `marks`, what `ci/measured.py` left. A process without data must have been ended on purpose, by a
process that said so, or as the child of such a one; of a job under torchrun every rank must have been measured; and some rank beside
the first. Else the run fails, whatever the percentage is: lines that only a lost rank runs would be called untested.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["faults", "main"]

_DATA = re.compile(r"\.coverage\.(?P<host>.+)\.pid(?P<pid>\d+)\.X\w+")

type Process = tuple[str, int]


def faults(folder: Path) -> tuple[list[str], str]:
    """What is wrong with the data in `folder`, and one line about its amount."""
    started = {_process(mark): mark for mark in _marks(folder, "started")}
    files = [match for file in folder.iterdir() if (match := _DATA.match(file.name))]
    left = {(match["host"], int(match["pid"])) for match in files}
    ended = {_process(mark) for mark in _marks(folder, "ended") if "pid" in mark}
    groups = {(mark["host"], mark["group"]) for mark in _marks(folder, "ended") if "group" in mark}

    def on_purpose(process: Process) -> bool:
        mark = started.get(process)
        if process in ended or mark is None:
            return process in ended
        if "NEMO_OPT_COVERAGE_KILLED" in mark or (mark["host"], mark["group"]) in groups:
            return True
        parent = (mark["host"], mark["parent"])
        return parent != process and parent not in left and on_purpose(parent)

    without = [process for process in started if process not in left]
    lost = [process for process in without if not on_purpose(process)]
    found = [f"no data of {_words(started[process])}" for process in lost] + _incomplete(started)
    if not left:
        found.append("nothing was measured")
    elif not any(int(started[process].get("RANK", 0)) for process in left if process in started):
        found.append("no rank but the first was measured")
    amount = f"{len(files)} data files of {len(left)} processes; {len(without) - len(lost)} more were ended on purpose"
    return found, f"{amount}; {len(lost)} lost theirs"


def _marks(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / "marks").glob(f"{kind}.*.json"))]


def _process(mark: dict[str, Any]) -> Process:
    return mark["host"], mark["pid"]


def _words(mark: dict[str, Any]) -> str:
    rank = f"rank {mark['RANK']} of {mark['WORLD_SIZE']}, " if "RANK" in mark else ""
    test = f", of {mark['PYTEST_CURRENT_TEST']}" if "PYTEST_CURRENT_TEST" in mark else ""
    return f"{rank}process {mark['pid']} on {mark['host']} ({mark['command']}){test}"


def _incomplete(started: dict[Process, dict[str, Any]]) -> list[str]:
    """Jobs of torchrun of which some ranks were not measured."""
    jobs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for mark in started.values():
        if "TORCHELASTIC_RUN_ID" in mark and "RANK" in mark:
            jobs[mark["TORCHELASTIC_RUN_ID"]].append(mark)
    sizes = {job: (int(marks[0]["WORLD_SIZE"]), {int(mark["RANK"]) for mark in marks}) for job, marks in jobs.items()}
    return [f"job {job}: only ranks {sorted(ranks)} of {size} were measured" for job, (size, ranks) in sizes.items() if len(ranks) < size]


def main(arguments: Sequence[str]) -> int:
    """Judges the folder that is named; returns the exit code."""
    found, amount = faults(Path(arguments[0]))
    print("\n".join([*found, f"coverage data: {amount}"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
