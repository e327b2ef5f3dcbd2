"""All that is known of a run, and the same as JSON."""

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_opt import __version__
from nemo_opt.testing.suite.history import Past, Run
from nemo_opt.testing.suite.machine import Machine
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome, Status, count

__all__ = ["Report", "versions", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, and what is usual."""

    run: Run
    """As later runs will know it."""
    outcomes: list[Outcome]
    """One for each chosen script, by name."""
    machine: Machine
    """Where it ran."""
    metrics: Path
    """Directory of what scripts left to be drawn, one in it for each."""
    usual_s: dict[str, float] = field(default_factory=dict)
    """How long scripts took before, where that is known."""
    past: dict[str, list[Past]] = field(default_factory=dict)
    """Older runs of each script, of the same kind, oldest first."""
    older: list[Run] = field(default_factory=list)
    """Older runs of every kind, oldest first."""
    left_out: list[Script] = field(default_factory=list)
    """Quarantined scripts that were not asked for."""
    ready_to_return: list[str] = field(default_factory=list)
    """Quarantined scripts that passed often enough to leave it."""

    @property
    def good(self) -> bool:
        """Whether the run is a success."""
        return self.run.exit_code == 0

    @property
    def summary(self) -> str:
        """One line."""
        number = len(self.outcomes)
        return f"{number} {'script' if number == 1 else 'scripts'} in {self.run.time_s:.0f} s: {count(self.outcomes)}"

    def asserts_fewer(self, outcome: Outcome) -> int | None:
        """How much the script asserted when it passed last, where that was more than now: part of it may no longer run."""
        passed = [past.asserted for past in self.past.get(outcome.name, []) if past.status == Status.PASS]
        return passed[-1] if outcome.status is Status.PASS and passed and passed[-1] > len(outcome.assertions) else None


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {"nemo_opt": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "megatron-core", "nvidia-modelopt", "transformers", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(report: Report, place: Path) -> None:
    """Writes everything but older runs; `schema` counts changes of the form."""
    run = report.run
    values: dict[str, Any] = {"schema": 1, "started": run.started, "time_s": run.time_s, "exit_code": run.exit_code}
    values |= {"summary": report.summary, "commit": run.commit, "device": run.device, "cores": report.machine.cores}
    values |= {"gpus": len(report.machine.gpus), "fresh": run.fresh, "jobs": run.jobs, "versions": versions()}
    values["scripts"] = [{**outcome.row(), "usual_s": report.usual_s.get(outcome.name)} for outcome in report.outcomes]
    values["quarantine_left_out"] = [script.row() for script in report.left_out]
    values["ready_to_return"] = report.ready_to_return
    place.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
