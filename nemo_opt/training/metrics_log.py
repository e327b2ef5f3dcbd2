"""metrics.jsonl: what a run reached, line by line, so that a killed run leaves it. Written by rank 0.

A run that goes on from a checkpoint drops the lines of steps after it, which it will write again.
"""

import json
import os
from pathlib import Path
from typing import Any

import nemo_opt._stack

import torch.distributed as dist

__all__ = ["METRICS_NAME", "MetricsLog", "read_metrics"]

METRICS_NAME = "metrics.jsonl"


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines in `directory`; none where there is no log. A last line that was cut short is left out."""
    path = Path(directory) / METRICS_NAME
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines if line]


class MetricsLog:
    """The log of one run; on other ranks, and without a directory, it swallows lines.

    Args:
        directory: Where metrics.jsonl lies; made if needed.
        after: Steps that were done before; later ones are dropped from an older log, and all where it is 0.

    """

    def __init__(self, directory: str | Path | None, *, after: int = 0) -> None:
        self._file = None
        if directory is None or dist.get_rank() != 0:
            return
        Path(directory).mkdir(parents=True, exist_ok=True)
        _drop_after(Path(directory), after)
        self._file = (Path(directory) / METRICS_NAME).open("a", buffering=1, encoding="utf-8")

    def write(self, **values: float) -> None:
        """Adds a line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Ends the log."""
        if self._file is not None:
            self._file.close()


def _drop_after(directory: Path, step: int) -> None:
    kept = [line for line in read_metrics(directory) if line.get("step", 0) <= step] if step else []
    partial = directory / f".{METRICS_NAME}.{os.getpid()}"
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(directory / METRICS_NAME)
