"""What CI runs, decided from the event: `python3 ci/plan.py tiers|matrix|required`. Needs no package, so that any runner can ask.

- `tiers` reads EVENT, REF, DEFAULT_BRANCH, ACTION and LABEL, and says of each optional job whether it is wanted.
- `matrix` reads `nemo-opt suite list --json` from stdin and DEVICE, and gives one job a script. No script is an error, not an empty matrix.
- `required` reads NEEDS (GitHub's `toJSON(needs)`), and fails unless every job succeeded, but those that `tiers` did not want.

The first two write `name=value` lines, for $GITHUB_OUTPUT. A label counts when it is put on, not while it stays: new commits run on GPUs
only when somebody looked at them and put it on again (NeMo takes the label off for that).
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["main", "matrix", "required", "tiers"]

RUN, MORE = "Run CICD", "needs-more-tests"
OVERHEAD_MINUTES = 30
"""For the environment (5 GB of downloads where there is no cache) and the fixtures, beside a script's own time limit."""

_RUNNERS = {"cpu": ["ubuntu-24.04"], "cuda": ["self-hosted", "gpu"]}


def tiers(event: str, *, ref: str = "", default_branch: str = "main", action: str = "", label: str = "") -> dict[str, bool]:
    """Whether each optional job is wanted; unit tests and lint always run."""
    put_on = label if action == "labeled" else ""
    trusted = event in ("merge_group", "workflow_dispatch") or (event == "push" and ref == f"refs/heads/{default_branch}")
    return {
        "l2-cpu": trusted or event == "pull_request",
        "l2-gpu": trusted or put_on in (RUN, MORE),
        "more": event == "workflow_dispatch" or put_on == MORE,
    }


def matrix(scripts: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """One job for each script: name, runner and minutes.

    Raises:
        ValueError: There is no script, or a name is part of another one, which `--only` could not tell apart.

    """
    names = [script["name"] for script in scripts]
    if not names:
        raise ValueError("no functional script is selected")
    if unclear := [(a, b) for a in names for b in names if a != b and a in b]:
        raise ValueError(f"names that are part of others cannot be run alone: {unclear}")
    return [
        {
            "name": script["name"],
            "runs_on": _RUNNERS[device],
            "minutes": math.ceil(script["timeout"] / 60) + OVERHEAD_MINUTES,
        }
        for script in scripts
    ]


def required(needs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps a change from being merged; empty if nothing does."""
    wanted = needs.get("tiers", {}).get("outputs") or {}
    if not wanted:
        return ["the job `tiers` said nothing"]
    results = {name: job["result"] for name, job in needs.items()}
    missing = sorted(name for name in wanted if name not in results)
    unasked = {name for name, value in wanted.items() if value == "false"}
    found = [
        f"{name}: {result}" for name, result in results.items() if result != "success" and not (name in unasked and result == "skipped")
    ]
    return found + [f"{name}: not among the needed jobs" for name in missing]


def _tiers(environment: Mapping[str, str]) -> list[str]:
    keys = {"ref": "REF", "default_branch": "DEFAULT_BRANCH", "action": "ACTION", "label": "LABEL"}
    wanted = tiers(environment["EVENT"], **{key: environment.get(name, "") for key, name in keys.items()})
    return [f"{job}={str(value).lower()}" for job, value in wanted.items()]


def main(command: str) -> int:
    """Runs one of the three; returns the exit code."""
    environment = os.environ
    if command == "tiers":
        print("\n".join(_tiers(environment)))
        return 0
    if command == "matrix":
        try:
            print(f"matrix={json.dumps(matrix(json.load(sys.stdin), environment['DEVICE']))}")
        except ValueError as error:
            print(f"plan: {error}", file=sys.stderr)
            return 1
        return 0
    if command == "required":
        found = required(json.loads(environment["NEEDS"]))
        print("\n".join(found) or "every job that was wanted succeeded")
        return 1 if found else 0
    print(f"plan: {command!r} is none of tiers, matrix, required", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
