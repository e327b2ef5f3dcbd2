"""Fails when a module of nemo_opt (but cpu/ and scripts/) has less than 90 % of its lines covered.

`python ci/coverage_gate.py DATA_FILE`; run by `tox -e coverage`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FLOOR_PERCENT = 90.0
EXEMPT = ("nemo_opt/cpu/", "nemo_opt/scripts/")


def main() -> int:
    """Prints the modules below the floor; 1 if there are any, or if nothing was measured."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "--data-file", sys.argv[1], "-o", str(report)], check=True)
        files = json.loads(report.read_text())["files"]
    gated = {name: data["summary"] for name, data in files.items() if not name.startswith(EXEMPT) and data["summary"]["num_statements"]}
    low = {name: s for name, s in gated.items() if 100 * s["covered_lines"] / s["num_statements"] < FLOOR_PERCENT}
    for name, s in sorted(low.items()):
        print(f"{name}: {100 * s['covered_lines'] / s['num_statements']:.1f} % of {s['num_statements']} lines < {FLOOR_PERCENT} %")
    print(f"coverage gate: {len(gated) - len(low)} of {len(gated)} modules at or above {FLOOR_PERCENT} % of lines")
    return 1 if low or not gated else 0


if __name__ == "__main__":
    sys.exit(main())
