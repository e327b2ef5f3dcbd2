"""Apache Otava as a rival in `nemo_opt.perf.power`, asked in an environment of its own.

It pins numpy and scipy, and brings clients of databases. `bash ci/otava.sh` makes that environment and prints the table.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nemo_opt.errors import ConfigError
from nemo_opt.perf.detector import LOOK_BACK
from nemo_opt.perf.rivals import Draw, Rule

__all__ = ["NAME", "otava"]

NAME = "E-divisive, t-test p < 0.001, +3 % (Apache Otava)"

_ANSWERER = """
import json, sys
from otava.analysis import compute_change_points
print("ready", flush=True)
for line in sys.stdin:
    points, _ = compute_change_points(json.loads(line), window_len=50, max_pvalue=0.001, min_magnitude=0.03)
    print(json.dumps([[int(point.index), float(point.stats.forward_rel_change())] for point in points]), flush=True)
"""


@contextmanager
def otava(python: Path) -> Iterator[Rule]:
    """A rule that fails where Otava, with its own defaults, sees a change for the worse among the last runs.

    Args:
        python: Of an environment with apache-otava.

    Raises:
        ConfigError: It has none.

    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([str(python), "-c", _ANSWERER], text=True, **pipes) as process:  # type: ignore[call-overload]
        if process.stdout.readline() != "ready\n":
            raise ConfigError(f"{python} does not run Apache Otava: pip install apache-otava there\n{process.stderr.read()[-500:]}")

        def rule(draw: Draw) -> bool:
            values = np.exp([*draw.history, draw.latest]).tolist()
            process.stdin.write(json.dumps(values) + "\n")
            process.stdin.flush()
            points = json.loads(process.stdout.readline())
            return any(index >= len(values) - LOOK_BACK and change > 0 for index, change in points)

        try:
            yield rule
        finally:
            process.kill()
