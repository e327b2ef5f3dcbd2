"""The rival is asked in its own environment; here a program that answers as Otava would stands for it (`ci/otava.sh` runs the real one)."""

import math

import numpy as np
import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.perf import power
from nemo_opt.perf.detector import LOOK_BACK
from nemo_opt.perf.otava import NAME, otava
from nemo_opt.perf.rivals import Draw

ANSWERS = """#!/usr/bin/env python3
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    values = json.loads(line)
    print(json.dumps({points}), flush=True)
"""


@pytest.fixture
def program(tmp_path):
    """An executable that answers every series with these points."""

    def make(points):
        place = tmp_path / "python"
        place.write_text(ANSWERS.replace("{points}", points))
        place.chmod(0o755)
        return place

    return make


def draw(*values):
    logs = np.log(values)
    return Draw(history=logs[:-1], latest=float(logs[-1]), fresh=np.zeros(2), rounds=(np.zeros(2), np.zeros(2)))


@pytest.mark.parametrize(
    ("points", "fails"),
    [
        ("[]", False),
        ("[[len(values) - 1, 0.1]]", True),
        ("[[len(values) - 1, -0.1]]", False),
        (f"[[len(values) - {LOOK_BACK}, 0.1]]", True),
        (f"[[len(values) - {LOOK_BACK + 1}, 0.1]]", False),
        ("[[2, 0.3], [len(values) - 2, 0.1]]", True),
        ("[[len(values) - 1, 0.1 if abs(values[-1] - 3.0) < 1e-9 else -0.1]]", True),
    ],
)
def test_a_late_change_for_the_worse_fails(program, points, fails):
    with otava(program(points)) as rule:
        assert rule(draw(*[1.0] * 20, 3.0)) is fails
        assert rule(draw(*[1.0] * 20, 3.0)) is fails


def test_without_otava_it_is_said(tmp_path):
    place = tmp_path / "python"
    place.write_text("#!/bin/sh\necho ModuleNotFoundError: otava >&2\n")
    place.chmod(0o755)
    with pytest.raises(ConfigError, match=r"(?s)does not run Apache Otava: pip install.*ModuleNotFoundError"), otava(place):
        pass


def test_it_is_a_row_of_the_table(program, capsys):
    assert power.main(["--trials", "2", "--runs", "12", "--otava", str(program("[[len(values) - 1, 0.1]]"))]) == 0
    said = capsys.readouterr().out
    assert NAME.split(",")[0] in said
    row = next(row for row in power.power_table(power.invented_noise(), trials=2, runs=12, rules={"x": lambda _: True}) if row.rule == "x")
    assert (row.false_alarm, row.ten_at_once) == (1.0, 1.0)
    assert math.isclose(row.inconclusive, 0.0)
