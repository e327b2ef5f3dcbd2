"""Verdicts on scripts and runs, each way to end apart."""

import datetime as dt
from pathlib import Path

import pytest

from nemo_opt.testing.assertions import Assertion
from nemo_opt.testing.suite.script import Script
from nemo_opt.testing.suite.verdict import Outcome, Status, count, exit_code, judge

GOOD = Assertion(kind="check", what="loss < 1", holds=True)
BAD = Assertion(kind="check", what="loss < 0", holds=False)
PASS, FAIL, TIMEOUT, INFRASTRUCTURE, NOT_RUN = Status


@pytest.mark.parametrize(
    ("code", "assertions", "status", "reason"),
    [
        (0, [GOOD], PASS, ""),
        (0, [], FAIL, "asserted nothing: an exit code is no oracle, use `check` or `refused` of lib.sh"),
        (0, [GOOD, BAD], FAIL, "exit code 0, but does not hold: loss < 0"),
        (1, [GOOD, BAD], FAIL, "exit code 1, does not hold: loss < 0"),
        (3, [GOOD], FAIL, "exit code 3"),
        (3, [], FAIL, "exit code 3"),
        (137, [GOOD], FAIL, "exit code 137: a command was ended by SIGKILL"),
        (255, [GOOD], FAIL, "exit code 255"),
        (-11, [GOOD], FAIL, "ended by SIGSEGV"),
        (124, [GOOD], TIMEOUT, "a step ran out of its time"),
        (None, [GOOD], TIMEOUT, "longer than 2.5 s"),
        (75, [GOOD, BAD], INFRASTRUCTURE, "exit code 75: something it needs is not there, its log says what"),
    ],
)
def test_judge(code, assertions, status, reason):
    assert judge(code, 2.5, assertions) == (status, reason)


def outcomes(counting, quarantined=()):
    def outcome(status, expires):
        script = Script(
            path=Path("L2_A.sh"), tier="L2", ranks=1, timeout_s=1, device="any", needs=(), owner="@x", issue="#1", expires=expires
        )
        return Outcome(script=script, status=status)

    return [outcome(status, None) for status in counting] + [outcome(status, dt.date(2999, 1, 1)) for status in quarantined]


@pytest.mark.parametrize(
    ("counting", "quarantined", "code"),
    [
        ([PASS], [], 0),
        ([PASS, NOT_RUN], [], 0),
        ([PASS, FAIL], [], 1),
        ([PASS, TIMEOUT], [], 1),
        ([PASS, INFRASTRUCTURE], [], 75),
        ([PASS, INFRASTRUCTURE, FAIL], [], 1),
        ([NOT_RUN], [], 1),
        ([INFRASTRUCTURE, NOT_RUN], [], 75),
        ([PASS], [FAIL, TIMEOUT, INFRASTRUCTURE], 0),
        ([FAIL], [PASS], 1),
        ([NOT_RUN], [PASS], 1),
        ([], [FAIL], 0),
        ([], [NOT_RUN], 1),
        ([], [INFRASTRUCTURE], 1),
        ([], [], 1),
    ],
)
def test_exit_code(counting, quarantined, code):
    assert exit_code(outcomes(counting, quarantined)) == code


def test_count():
    assert count(outcomes([PASS, NOT_RUN, PASS], [FAIL])) == "2 pass, 1 not run, 1 fail in quarantine"
