"""Proof of `nemo-opt bench compare`: real slowdowns, planted in copies of this tree, turn it red under the right name; itself it is green.

No sleeps: an extra collective, an extra copy, as a careless change would bring them. Run it on the machine that shall judge:

    python benchmarks/planted.py                # each planted slowdown once
    python benchmarks/planted.py --clean 20     # the tree against itself, so many times
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Planted:
    """A slowdown: in `file`, what stands for `found`; `series` must be red, and `measured` says which measurements run."""

    name: str
    file: str
    found: str
    planted: str
    series: str
    measured: str


PLANTED = (
    Planted(
        "an extra collective in the distillation step",
        "distill/divergence.py",
        "    first = student.size(-1) *",
        "    if group is not None:\n"
        "        dist.all_reduce(student.detach().clone(), group=group)\n"
        "        dist.all_reduce(teacher.detach().clone(), group=group)\n"
        "    first = student.size(-1) *",
        "distillation step/TP2PP1",
        "distillation step",
    ),
    Planted(
        "an extra copy in the distillation step",
        "distill/divergence.py",
        "    first = student.size(-1) *",
        "    student, teacher = student.double().float(), teacher.double().float()\n    first = student.size(-1) *",
        "distillation step/",
        "distillation step",
    ),
    Planted(
        "an extra copy in calibration",
        "quantize/calibration.py",
        "return forward_loop(batches,",
        "return _slower(batches,",
        "calibration/",
        "calibration",
    ),
)
SLOWER = """

def _slower(batches, **settings):
    run = forward_loop(batches, **settings)

    def loop(model):
        for _ in batches:
            for parameter in model.parameters():
                parameter.detach().double().clone()
        run(model)

    return loop
"""


def plant(one, folder):
    """A copy of the library with the slowdown in it."""
    shutil.copytree(ROOT / "nemo_opt", folder / "nemo_opt", ignore=shutil.ignore_patterns("__pycache__"))
    place = folder / "nemo_opt" / one.file
    text = place.read_text()
    if text.count(one.found) != 1:
        raise SystemExit(f"{one.name}: {one.file} has {one.found!r} {text.count(one.found)} times, not once: plant it elsewhere")
    place.write_text(text.replace(one.found, one.planted) + (SLOWER if "_slower" in one.planted else ""))


def compare(head, measured, folder, pairs=None):
    """Exit code and judgements of the command."""
    result = Path(folder) / "compare.json"
    command = [sys.executable, "-m", "nemo_opt.cli", "bench", "compare", str(ROOT), str(head), "--no-exact", "--json", str(result)]
    command += ["--pairs", str(pairs)] if pairs else []
    done = subprocess.run([*command, "--only", measured], cwd=ROOT, capture_output=True, text=True, check=False)
    if not result.exists():
        raise SystemExit(f"compare failed:\n{done.stdout}{done.stderr}")
    rows = json.loads(result.read_text())["rows"]
    return done.returncode, {row["series"]: (row["verdict"], row["change"]) for row in rows}, done.stdout


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=0, metavar="N", help="instead, the tree against itself, N times")
    parser.add_argument("--only", default="", help="only measurements, or planted slowdowns, whose name contains this")
    parser.add_argument("--pairs", type=Path, help="file to which --clean appends what it measures, for nemo_opt.perf.power")
    options = parser.parse_args(arguments)
    wrong = 0
    for number in range(options.clean):
        with tempfile.TemporaryDirectory() as folder:
            code, verdicts, said = compare(ROOT, options.only, folder, options.pairs)
        wrong += code != 0
        print(
            f"clean {number + 1}: exit code {code}; " + "; ".join(f"{s} {v} {c:+.1%}" for s, (v, c) in sorted(verdicts.items())), flush=True
        )
    for one in (one for one in PLANTED if not options.clean and options.only in one.name):
        with tempfile.TemporaryDirectory() as folder:
            plant(one, Path(folder) / "tree")
            code, verdicts, said = compare(Path(folder) / "tree", one.measured, folder)
        red = [series for series, (verdict, _) in verdicts.items() if verdict == "REGRESSION"]
        is_right = code == 1 and red and all(series.startswith(one.series) for series in red)
        wrong += not is_right
        print(f"{'ok' if is_right else 'WRONG'}: {one.name}: exit code {code}, red: {', '.join(red) or 'nothing'}\n{said}", flush=True)
    print(f"{wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
