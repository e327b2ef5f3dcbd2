"""Faults that must turn a run red, each with the test that plants it. Whoever adds a comparator adds its fault here.

The list is what the harness promises; this module makes sure that each test is still there, runs by default and is not skipped.
"""

import ast
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1]

PLANTED = {
    # the runner
    "silent exit 0 of a failing first command": "testing/test_suite_run.py::test_no_failure_is_silent",
    "silent exit 0, in the real lib.sh": "testing/test_suite_lib.py::test_a_first_command_that_fails_ends_the_script",
    "a script that lets commands fail unseen": "testing/test_suite_script.py::test_a_script_whose_exit_code_means_nothing_is_refused",
    "a script that asserts nothing": "testing/test_suite_verdict.py::test_judge",
    "a failed assertion that is swallowed": "testing/test_suite_lib.py::test_checks_are_recorded",
    "a hung script": "testing/test_suite_process.py::test_a_hung_script_is_ended_at_its_limit",
    "a hung script that ignores its end": "testing/test_suite_process.py::test_nothing_stubborn_is_left",
    "a dead child": "testing/test_suite_lib.py::test_a_step_whose_process_is_killed_fails",
    "a skipped script: misnamed": "testing/test_suite_script.py::test_a_file_that_no_run_would_find_is_refused",
    "a skipped script: no GPU": "testing/test_suite_run.py::test_a_script_that_needs_a_gpu_is_not_passed",
    "a script without a header": "testing/test_suite_script.py::test_bad_headers",
    "an empty selection": "testing/test_suite_run.py::test_an_empty_selection_is_no_success",
    "a corrupted fixture": "testing/test_suite_run.py::TestFixtures::test_a_script_during_which_they_were_corrupted_is_no_pass",
    "a corrupted fixture, found before": "testing/test_fixtures.py::test_damage_is_named_and_mended",
    "no fixtures": "testing/test_suite_run.py::TestFixtures::test_without_them_a_script_is_no_pass",
    "an expired quarantine": "testing/test_suite_run.py::TestQuarantine::test_an_expired_one_stops_every_run",
    "a fork server that is gone": "testing/test_suite_run.py::TestForkServer::test_one_that_is_gone_is_infrastructure",
    "a full disk": "testing/test_suite_lib.py::test_a_full_disk_is_told_apart",
    # the comparators
    "NaN in a checked number": "testing/test_check.py::test_refused",
    "a missing number": "testing/test_check.py::TestRecord::test_what_cannot_be_judged_does_not_hold",
}


def find(place):
    """The function that `place` names, as syntax."""
    path, *names = place.split("::")
    scope = ast.parse((UNIT / path).read_text())
    for name in names:
        scope = next((n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name), None)
        assert scope is not None, f"{place}: no {name}"
    return scope


@pytest.mark.parametrize("fault", PLANTED)
def test_each_fault_is_planted_by_a_test_that_runs(fault):
    function = find(PLANTED[fault])
    assert function.name.startswith("test_")
    marks = " ".join(ast.unparse(mark) for mark in function.decorator_list)
    assert not any(f"mark.{word}" in marks for word in ("skip", "xfail", "wide")), "it would not run, or not count"
    assert any(isinstance(node, ast.Assert) or "raises" in ast.unparse(node) for node in ast.walk(function)), "it asserts nothing"


def test_at_least_a_dozen():
    assert len(PLANTED) >= 12
