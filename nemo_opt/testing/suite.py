"""Runs functional scripts: each has a header, a time limit and one contiguous log; passed, failed, timed out and not run are told apart.

A script's header is a comment line of `key=value` words, such as `# tier=L2 ranks=2 timeout=600 device=any needs=fixtures owner=@x`.
Decisions: nothing selected is a failure; a script whose device is absent, or whose fixtures cannot be made, is "not run", never passed, and
is listed; fixtures are made once before the first script that needs them; the whole process group of a script is ended at its time limit;
ranks are forked from one process that has imported the stack (`fork_server`), unless fresh ones are asked for, or coverage is measured.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nemo_opt.errors import ConfigError, NemoOptError
from nemo_opt.testing.fork_server import ForkServer

__all__ = ["Outcome", "Script", "discover", "main", "run_script", "select"]

type Status = Literal["pass", "fail", "timeout", "not run"]

TIMEOUT_EXIT = 124
"""Exit code of lib.sh when a step inside a script ran out of its own time."""

_REQUIRED = ("tier", "ranks", "timeout", "device", "needs", "owner")
_DEVICES = ("any", "cpu", "cuda")
_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Script:
    """A functional script and what its header says."""

    path: Path
    """The file."""
    tier: str
    """L0, L1 or L2."""
    ranks: int
    """Ranks it starts at a time, at most."""
    timeout_s: int
    """Time limit of the whole script."""
    device: str
    """any, cpu or cuda."""
    needs: tuple[str, ...]
    """What must be there before: fixtures, or none."""
    owner: str
    """Whom to ask."""

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.path.stem


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a script ended."""

    name: str
    """The script."""
    status: Status
    """pass, fail, timeout, or not run."""
    time_s: float
    """Wall-clock seconds."""
    exit_code: int | None
    """None where it did not run or was ended."""
    log: str | None
    """Its log."""
    reason: str
    """Why it did not pass; empty when it did."""


def discover(folder: Path) -> list[Script]:
    """All scripts `L<n>_*.sh` in `folder`, by name.

    Raises:
        ConfigError: There are none, or a header is missing or wrong.

    """
    paths = sorted(folder.glob("L[0-9]_*.sh"))
    if not paths:
        raise ConfigError(f"{folder} holds no functional script (L0_*.sh, L1_*.sh, L2_*.sh): name the right folder")
    return [_parse(path) for path in paths]


def _parse(path: Path) -> Script:
    lines = [line for line in path.read_text().splitlines()[:10] if line.startswith("# tier=")]
    if len(lines) != 1:
        raise ConfigError(f"{path} needs one header line such as '# tier=L2 ranks=2 timeout=600 device=any needs=none owner=@x'")
    words = dict(word.split("=", 1) for word in shlex.split(lines[0][2:]) if "=" in word)
    if missing := [key for key in _REQUIRED if not words.get(key)]:
        raise ConfigError(f"{path}: the header lacks {', '.join(missing)}")
    if unknown := sorted(words.keys() - set(_REQUIRED)):
        raise ConfigError(f"{path}: the header has unknown keys {unknown}; known are {list(_REQUIRED)}")
    if not path.name.startswith(words["tier"] + "_"):
        raise ConfigError(f"{path}: tier {words['tier']} does not agree with the file's name")
    if words["device"] not in _DEVICES:
        raise ConfigError(f"{path}: device {words['device']!r} is none of {list(_DEVICES)}")
    for key in ("ranks", "timeout"):
        if not words[key].isdigit() or int(words[key]) < 1:
            raise ConfigError(f"{path}: {key} {words[key]!r} is not a positive number")
    needs = tuple(need for need in words["needs"].split(",") if need != "none")
    if wrong := [need for need in needs if need != "fixtures"]:
        raise ConfigError(f"{path}: needs {wrong} is unknown; known are fixtures and none")
    return Script(
        path=path,
        tier=words["tier"],
        ranks=int(words["ranks"]),
        timeout_s=int(words["timeout"]),
        device=words["device"],
        needs=needs,
        owner=words["owner"],
    )


def select(scripts: Sequence[Script], tier: str | None = None, only: Sequence[str] = ()) -> list[Script]:
    """Scripts of `tier` whose name contains one of `only`; raises `ConfigError` where nothing remains."""
    chosen = [s for s in scripts if (tier is None or s.tier == tier) and (not only or any(word in s.name for word in only))]
    if not chosen:
        raise ConfigError(f"no script selected by tier {tier!r} and names {list(only)}; there are {[s.name for s in scripts]}")
    return chosen


def run_script(script: Script, logs: Path, environment: dict[str, str]) -> Outcome:
    """Runs one script with its time limit, its output in one log."""
    log = logs / f"{script.name}.log"
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", str(script.path)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=script.timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    status, reason = _verdict(code, script.timeout_s)
    return Outcome(name=script.name, status=status, time_s=time.perf_counter() - start, exit_code=code, log=str(log), reason=reason)


def _verdict(code: int | None, timeout_s: int) -> tuple[Status, str]:
    if code is None:
        return "timeout", f"longer than {timeout_s} s"
    if code == TIMEOUT_EXIT:
        return "timeout", "a step ran out of its time"
    if code < 0:
        return "fail", f"ended by {signal.Signals(-code).name}"
    return ("pass", "") if code == 0 else ("fail", f"exit code {code}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM for the group, then SIGKILL: a script that has ended may have left children too."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)


def _absent_device(script: Script) -> str:
    """Why the script's device is not there; empty if it is."""
    cuda = Path("/dev/nvidiactl").exists() and os.environ.get("NEMO_OPT_DEVICE") != "cpu"
    if script.device == "cuda" and not cuda:
        return "no CUDA device here"
    if script.device == "cpu" and cuda and os.environ.get("NEMO_OPT_DEVICE") != "cpu":
        return "only without CUDA (set NEMO_OPT_DEVICE=cpu)"
    return ""


def _make_fixtures() -> str:
    """Makes the fixtures; returns why that failed, or nothing."""
    from nemo_opt.launch import RankFailedError
    from nemo_opt.testing.fixtures import build

    try:
        build()
    except (NemoOptError, RankFailedError, OSError) as error:
        return f"no fixtures: {error}"
    return ""


def _run_all(scripts: Sequence[Script], logs: Path) -> list[Outcome]:
    outcomes = []
    no_fixtures: str | None = None
    for number, script in enumerate(scripts, start=1):
        reason = _absent_device(script)
        if not reason and "fixtures" in script.needs:
            no_fixtures = _make_fixtures() if no_fixtures is None else no_fixtures
            reason = no_fixtures
        if reason:
            outcomes.append(Outcome(name=script.name, status="not run", time_s=0.0, exit_code=None, log=None, reason=reason))
        else:
            print(f"[{number}/{len(scripts)}] {script.name} (at most {script.timeout_s} s)", flush=True)
            outcomes.append(run_script(script, logs, {"PYTHON": sys.executable}))
        if outcomes[-1].status != "pass":
            print(f"    {outcomes[-1].status}: {outcomes[-1].reason}", flush=True)
            _print_tail(outcomes[-1])
    return outcomes


def _print_tail(outcome: Outcome, lines: int = 25) -> None:
    if outcome.log is not None:
        text = Path(outcome.log).read_text(errors="replace").splitlines()[-lines:]
        print("\n".join(f"    | {line}" for line in text), flush=True)


def _show(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"pass": "green", "fail": "red", "timeout": "red", "not run": "yellow"}
    table = Table(title="Functional scripts", title_justify="left", title_style="bold")
    for title in ("script", "status", "time", "log or reason"):
        table.add_column(title, overflow="fold")
    for o in outcomes:
        where = ": ".join(part for part in (o.reason, o.log) if part)
        table.add_row(o.name, f"[{colours[o.status]}]{o.status}[/]", f"{o.time_s:.0f} s", where)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    counts = {status: sum(o.status == status for o in outcomes) for status in colours}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


@contextmanager
def _fork_server(logs: Path) -> Iterator[None]:
    """For this process (which makes fixtures) and its scripts."""
    with ForkServer(logs / "fork_server.log") as named:
        os.environ.update(named)
        try:
            yield
        finally:
            for name in named:
                del os.environ[name]


def main(
    *, folder: Path, logs: Path, tier: str | None = None, only: Sequence[str] = (), json_path: Path | None = None, fresh: bool = False
) -> int:
    """Runs what is selected and prints a table; 0 only if at least one script passed and none failed or timed out."""
    scripts = select(discover(folder), tier, only)
    logs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with nullcontext() if fresh or os.environ.get("NEMO_OPT_COVERAGE") == "1" else _fork_server(logs):
        outcomes = _run_all(scripts, logs)
    print(f"{len(outcomes)} scripts in {time.perf_counter() - start:.0f} s")
    _show(outcomes)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"scripts": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    bad = any(o.status in ("fail", "timeout") for o in outcomes)
    return 1 if bad or not any(o.status == "pass" for o in outcomes) else 0
