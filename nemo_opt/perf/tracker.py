"""Runs of the benchmarks and what is made of them: measured, recorded, judged against their history, and shown.

Decisions:
- A run is confirmed only as declared: where a jump was seen, exactly two fresh runs, all three recorded. Never until it is green.
- A record is written also when benchmarks failed; the exit code then says so.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.perf import record
from nemo_opt.perf.accepted import Accepted, read_accepted, unplaced
from nemo_opt.perf.detector import FRESH_RUNS
from nemo_opt.perf.history import in_order, read_history
from nemo_opt.perf.judge import judge
from nemo_opt.perf.platform import platform_key
from nemo_opt.perf.record import Record
from nemo_opt.perf.report import Report
from nemo_opt.perf.verdict import Verdict

__all__ = ["Past", "judged", "measure", "past", "run"]

ACCEPTED = "accepted.toml"
"""Beside the folder of the history."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of a platform."""

    records: tuple[Record, ...]
    """Oldest first."""
    accepted: tuple[Accepted, ...]
    """New levels that people accepted."""


def past(folder: Path, platform: str | None = None) -> Past:
    """The history in `folder/<platform>`, by default of this machine's; empty where nothing was ever measured.

    Raises:
        DataError: A file cannot be read, or an entry of accepted.toml is incomplete.

    """
    place = folder / (platform or platform_key())
    records = read_history(place) if place.is_dir() else ()
    return Past(records=in_order(records), accepted=read_accepted(folder.parent / ACCEPTED))


def measure(benchmarks: Path, *, short: bool = True, only: str | None = None) -> Record:
    """One run in processes of its own; what pytest prints is shown.

    Args:
        benchmarks: Folder of the benchmarks.
        short: The short set.
        only: As pytest's -k.

    Raises:
        ConfigError: No benchmark is selected, or there are none.

    """
    if not benchmarks.is_dir():
        raise ConfigError(f"{benchmarks}: no such folder: start in the root of the repository, or give --benchmarks")
    with tempfile.TemporaryDirectory(prefix="nemo_opt_bench_") as folder:
        command = [sys.executable, "-m", "pytest", str(benchmarks), "-q", "-p", "no:cacheprovider", "--benchmark-disable-gc"]
        command += [
            "--benchmark-columns=median",
            "--record-to",
            folder,
            *(["-m", "not wide"] if short else []),
            *(["-k", only] if only else []),
        ]
        code = subprocess.run(command, env=os.environ | {"NEMO_OPT_FORK_SERVER": ""}, check=False).returncode
        places = list(Path(folder).glob("*/*.json"))
        if not places:
            raise ConfigError(f"pytest measured nothing (exit code {code}): see above; is {only or 'the set'} not empty?")
        return record.read(places[0])


def run(benchmarks: Path, folder: Path, *, short: bool = True, only: str | None = None, confirm: bool = True) -> Report:
    """Measures, records and judges; two fresh runs confirm jumps."""
    known = past(folder)
    latest = _recorded(measure(benchmarks, short=short, only=only), folder)
    judgements = judge(known.records, latest, known.accepted)
    if only:
        judgements = [judgement for judgement in judgements if judgement.verdict != Verdict.MISSING]  # left out on purpose
    if confirm and any(judgement.unconfirmed for judgement in judgements):
        print(f"a figure jumped: {FRESH_RUNS} fresh runs decide, by the median of the three", flush=True)
        fresh = [_recorded(measure(benchmarks, short=short, only=only), folder) for _ in range(FRESH_RUNS)]
        kept = {judgement.series for judgement in judgements}
        judgements = [one for one in judge(known.records, latest, known.accepted, fresh=fresh) if one.series in kept]
    return Report(record=latest, older=known.records, judgements=judgements, levels=known.accepted)


def _recorded(run: Record, folder: Path) -> Record:
    print(f"recorded in {record.write(run, folder)}", flush=True)
    return run


def judged(folder: Path, *, platform: str | None = None, commit: str | None = None) -> Report:
    """The last run in a history (or the last of a commit), judged by those before it.

    Raises:
        DataError: There is none.

    """
    known = past(folder, platform)
    runs = [one for one in known.records if one.commit.startswith(commit or "")]
    if not runs:
        what = f"of commit {commit} " if commit else ""
        raise DataError(f"{folder / (platform or platform_key())}: no run {what}is recorded there: `nemo-opt bench run` records one")
    for entry in unplaced(known.accepted, known.records):
        print(f"accepted.toml: {entry.series} since {entry.since}: that commit was never measured here, so the entry has no effect")
    latest = runs[-1]
    return Report(record=latest, older=known.records, judgements=judge(known.records, latest, known.accepted), levels=known.accepted)
