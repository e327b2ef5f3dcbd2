"""What became of a script, and of a run: decided from exit codes and recorded assertions, never from the words of a log."""

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from nemo_opt.testing.assertions import Assertion
from nemo_opt.testing.suite.script import Script

__all__ = ["INFRASTRUCTURE_EXIT", "TIMEOUT_EXIT", "Outcome", "Status", "count", "exit_code", "judge"]

TIMEOUT_EXIT = 124
"""Exit code of lib.sh when a step inside a script ran out of its own time, as of timeout(1)."""

INFRASTRUCTURE_EXIT = 75
"""Exit code of what failed for a reason outside of the code under test, as EX_TEMPFAIL of sysexits.h; and of a run with no other fault."""


class Status(StrEnum):
    """How a script ended."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    TIMEOUT = "timeout"
    INFRASTRUCTURE = "infrastructure"
    NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a script ended, and why."""

    script: Script
    """The script."""
    status: Status
    """The verdict."""
    reason: str = ""
    """Why it did not pass; empty when it did."""
    time_s: float = 0.0
    """Wall-clock seconds."""
    exit_code: int | None = None
    """None where it did not run or was ended."""
    log: str | None = None
    """Its log."""
    assertions: tuple[Assertion, ...] = ()
    """What it asserted."""

    @property
    def name(self) -> str:
        """The script's."""
        return self.script.name

    def row(self) -> dict[str, Any]:
        """As plain values."""
        assertions = [asdict(assertion) for assertion in self.assertions]
        row = {**self.script.row(), "status": str(self.status), "reason": self.reason, "time_s": self.time_s}
        return row | {"exit_code": self.exit_code, "log": self.log, "assertions": assertions}


def judge(code: int | None, limit_s: float, assertions: Sequence[Assertion]) -> tuple[Status, str]:
    """(status, reason) of a script that has ended.

    Args:
        code: Its exit code, negative for a signal; None where it was ended at its time limit.
        limit_s: The time limit.
        assertions: What it recorded.

    """
    if code is None:
        return Status.TIMEOUT, f"longer than {limit_s:g} s"
    if code == TIMEOUT_EXIT:
        return Status.TIMEOUT, "a step ran out of its time"
    if code == INFRASTRUCTURE_EXIT:
        return Status.INFRASTRUCTURE, f"exit code {code}: something it needs is not there, its log says what"
    broken = [assertion for assertion in assertions if not assertion.holds]
    why = f"does not hold: {broken[0].what}" if broken else ""
    if code:
        return Status.FAIL, ", ".join(part for part in (_exit_words(code), why) if part)
    if broken:
        return Status.FAIL, f"exit code 0, but {why}"
    if not assertions:
        return Status.FAIL, "asserted nothing: an exit code is no oracle, use `check` or `refused` of lib.sh"
    return Status.PASS, ""


def _exit_words(code: int) -> str:
    """The code; with the signal's name, where a signal ended the script, or (128 more) one of its commands."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    return f"ended by {name}" if code < 0 else f"exit code {code}: a command was ended by {name}"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Of the run: 0 only if something passed and nothing that counts went wrong; 75 where only infrastructure did; else 1.

    Quarantined scripts do not count, unless nothing else was chosen: then it is enough that they ran.
    """
    counting = [outcome for outcome in outcomes if not outcome.script.quarantined]
    found = {outcome.status for outcome in counting}
    if found & {Status.FAIL, Status.TIMEOUT}:
        return 1
    if Status.INFRASTRUCTURE in found:
        return INFRASTRUCTURE_EXIT
    if not counting:
        ran = {outcome.status for outcome in outcomes} - {Status.NOT_RUN, Status.INFRASTRUCTURE}
        return 0 if ran else 1
    return 0 if Status.PASS in found else 1


def count(outcomes: Sequence[Outcome]) -> str:
    """How many of each status, in words."""
    parts = []
    for quarantined, suffix in ((False, ""), (True, " in quarantine")):
        of_kind = [o.status for o in outcomes if o.script.quarantined == quarantined]
        parts += [f"{of_kind.count(status)} {status}{suffix}" for status in Status if status in of_kind]
    return ", ".join(parts)
