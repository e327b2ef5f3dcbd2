"""A run of the suite: what is chosen is scheduled, run, judged, shown and written down; nothing that did not run is called passed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Never

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.testing import assertions
from nemo_opt.testing.suite import junit, page, report, terminal
from nemo_opt.testing.suite.history import History, Run, default_place, pasts
from nemo_opt.testing.suite.machine import Machine
from nemo_opt.testing.suite.process import run_process
from nemo_opt.testing.suite.report import Report
from nemo_opt.testing.suite.schedule import run_all
from nemo_opt.testing.suite.script import Script, discover, select
from nemo_opt.testing.suite.supplies import Supplies
from nemo_opt.testing.suite.verdict import Outcome, Status, exit_code, judge

__all__ = ["Options", "main"]

SCALE_ENV, METRICS_ENV = "NEMO_OPT_TIMEOUT_SCALE", "NEMO_OPT_METRICS"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run, and where to write."""

    logs: Path
    """Directory of logs, and of what scripts left."""
    device: str | None = None
    """cpu or cuda; whatever is there by default."""
    jobs: int | None = None
    """Scripts at once; by default as many as have their ranks on the cores, or GPUs, that there are."""
    fresh: bool = False
    """Start every rank from nothing."""
    timeout_scale: float = 1.0
    """Factor of every time limit."""
    history: Path | None = None
    """File of older runs; in the user's cache by default."""
    junit: Path | None = None
    """Where to write JUnit XML."""
    json: Path | None = None
    """Where to write JSON."""
    html: Path | None = None
    """Where to write the page."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs {self.jobs}: at least 1 script at once")
        if not 0 < self.timeout_scale < float("inf"):
            raise ConfigError(f"timeout_scale {self.timeout_scale} is no factor of time limits: give a positive number")
        for place in (self.history, self.junit, self.json, self.html):
            if place is not None and place.is_dir():
                raise ConfigError(f"{place} is a directory: name a file")


def main(
    *,
    folder: Path,
    options: Options,
    tier: str | None = None,
    layout: str | None = None,
    only: Sequence[str] = (),
    quarantined: bool = False,
) -> int:
    """Runs what is selected of `folder`, prints a table and writes the reports; returns the exit code (see `verdict.exit_code`).

    Raises:
        ConfigError: A script of the folder is not what it must be, or nothing is selected.

    """
    there = discover(folder)
    chosen = select(there, tier=tier, layout=layout, only=only, device=options.device, quarantined=quarantined)
    done = _run(chosen, options, commit=_commit(folder))
    done = replace(done, left_out=[script for script in there if script.quarantined and not quarantined])
    terminal.show(done)
    for place, write in ((options.junit, junit.write), (options.json, report.write_json), (options.html, page.write)):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write(done, place)
    return done.run.exit_code


def _run(scripts: Sequence[Script], options: Options, *, commit: str) -> Report:
    """Runs them all, and remembers it for the next run."""
    machine, history = Machine.here(options.device), History(options.history or default_place())
    past = {script.name: history.of(script.name, device=machine.used, fresh=options.fresh) for script in scripts}
    usual_s = {name: time_s for name in past if (time_s := history.usual_s(past[name])) is not None}
    options.logs.mkdir(parents=True, exist_ok=True)
    started, start = datetime.now(UTC), time.monotonic()
    with _end_on_sigterm():
        outcomes = _outcomes(scripts, options, machine, usual_s)
    run = Run(
        started=started.isoformat(timespec="seconds"),
        commit=commit,
        device=machine.used,
        fresh=options.fresh,
        jobs=options.jobs,
        time_s=time.monotonic() - start,
        exit_code=exit_code(outcomes),
        scripts=pasts(outcomes),
    )
    older = list(history.runs)
    history.add(run)
    ready = [script.name for script in scripts if script.quarantined and history.is_ready_to_return(script.name)]
    return Report(
        run=run, outcomes=outcomes, machine=machine, metrics=options.logs, usual_s=usual_s, past=past, older=older, ready_to_return=ready
    )


def _outcomes(scripts: Sequence[Script], options: Options, machine: Machine, usual_s: dict[str, float]) -> list[Outcome]:
    """By name. What cannot run here is told at once, the rest as it ends."""
    ended: list[Outcome] = []
    progress = terminal.Progress(len(scripts), usual_s)

    def add(outcome: Outcome) -> None:
        ended.append(outcome)
        progress.ended(outcome)

    for script in scripts:
        if lack := machine.lacks(script):
            add(Outcome(script=script, status=Status.NOT_RUN, reason=lack))
    possible = [script for script in scripts if not machine.lacks(script)]
    # Without a past, the longest limit comes first.
    possible.sort(key=lambda script: usual_s.get(script.name, script.timeout_s), reverse=True)
    with Supplies(options.logs, forking=not options.fresh and bool(possible)) as supplies:
        supplies.make_fixtures(possible)

        def run(script: Script, gpus: tuple[str, ...], stop: threading.Event) -> Outcome:
            progress.started(script)
            return _run_script(script, options, supplies, machine.environment(gpus), stop)

        with closing(run_all(possible, machine, run, jobs=options.jobs)) as outcomes:
            for outcome in outcomes:
                add(outcome)
    return sorted(ended, key=lambda outcome: outcome.name)


def _run_script(script: Script, options: Options, supplies: Supplies, environment: dict[str, str], stop: threading.Event) -> Outcome:
    """Runs and judges one script, unless what it needs is missing."""
    if missing := supplies.missing(script):
        return Outcome(script=script, status=Status.INFRASTRUCTURE, reason=missing)
    log, asserted, metrics = (options.logs / f"{script.name}{ending}" for ending in (".log", ".assertions.jsonl", ".metrics"))
    environment = {name: value for name, value in os.environ.items() if name != "OUT"} | environment  # scripts share no OUT
    environment |= {"PYTHON": sys.executable, assertions.VARIABLE: str(asserted.absolute()), METRICS_ENV: str(metrics.absolute())}
    environment[SCALE_ENV] = str(options.timeout_scale)
    limit_s = script.timeout_s * options.timeout_scale
    try:
        asserted.unlink(missing_ok=True)
        shutil.rmtree(metrics, ignore_errors=True)
        ended = run_process(script.path, log, environment, limit_s, stop)
    except OSError as error:  # of this process: no room for the log, no process to be had
        return Outcome(script=script, status=Status.INFRASTRUCTURE, reason=f"it could not be run: {error}")
    try:
        found = assertions.read(asserted)
        status, reason = judge(ended.code, limit_s, found)
    except DataError as error:
        found, (status, reason) = [], (Status.FAIL, str(error))
    if trouble := supplies.damage(script) or (supplies.loss() if status is not Status.PASS else ""):
        status, reason = Status.INFRASTRUCTURE, f"{trouble} ({status}{': ' + reason if reason else ''})"
    return Outcome(
        script=script,
        status=status,
        reason=reason,
        time_s=ended.time_s,
        exit_code=ended.code,
        log=str(log),
        assertions=tuple(found),
    )


def _commit(folder: Path) -> str:
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """A cancelled job ends its scripts too, which are sessions of their own."""

    def leave(number: int, _: FrameType | None) -> Never:
        print(f"cancelled by {signal.Signals(number).name}: scripts that run are ended", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
