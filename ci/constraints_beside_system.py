"""Prints ci/constraints.txt without what is installed already: for an environment over the packages of the system, which shall stay."""

import re
from importlib.metadata import distributions
from pathlib import Path


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    there = {normal(distribution.name) for distribution in distributions()}
    for line in (Path(__file__).parent / "constraints.txt").read_text().splitlines():
        if not line.startswith("#") and normal(line.partition("==")[0]) not in there:
            print(line)
