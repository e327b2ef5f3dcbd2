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
    # ranks
    "a dead rank": "testing/test_ranks.py::test_death_is_reported_at_once",
    "a dead rank of a job": "test_launch.py::test_killed_single_rank",
    "a dead rank of a forked job": "testing/test_fork_server.py::test_the_first_failure_ends_all_and_is_named",
    "a hung rank": "testing/test_ranks.py::test_hang_shows_the_stack_of_every_rank",
    "a host that is gone": "test_hosts.py::test_a_silent_host_is_named_and_no_other",
    # parity
    "a wrong gradient on one rank": "testing/test_parity_cases.py::test_a_wrong_gradient_on_one_rank_is_named",
    "a wrong gradient: a sum left out": "testing/test_parity.py::test_the_oracle_sees_a_sum_that_was_left_out",
    "a wrong gradient: messages crosswise": "testing/test_parity.py::test_the_oracle_sees_messages_that_were_matched_crosswise",
    "a swapped amax: two channels": "testing/test_parity_cases.py::TestAmax::test_two_channels_that_are_swapped",
    "a swapped amax: two shards": "testing/test_parity_cases.py::TestAmax::test_two_shards_that_are_swapped",
    "a swapped amax: gate and up": "testing/test_parity_cases.py::TestAmax::test_gate_and_up_rows_that_are_swapped",
    "an off-by-one layer": "testing/test_parity_cases.py::test_other_indices_are_caught",
    "an off-by-one layer on one rank": "testing/test_parity_cases.py::test_a_rank_that_prunes_other_layers_is_named",
    "NaN in a gradient": "testing/test_parity.py::test_not_a_number_differs",
    "NaN in an amax": "testing/test_parity_cases.py::TestAmax::test_one_that_is_not_a_number",
    "a missing tensor": "testing/test_parity.py::test_a_missing_tensor_is_caught",
    "nothing to compare": "testing/test_parity.py::test_comparisons_that_prove_nothing_are_refused",
    # goldens
    "a stale golden: a step off": "testing/test_goldens.py::test_a_run_that_is_one_step_off",
    "a stale golden: other code": "testing/test_goldens.py::test_a_golden_of_other_code",
    "a shifted value, up or down": "testing/test_goldens.py::test_a_shifted_value",
    "NaN beside a golden": "testing/test_goldens.py::test_not_a_number",
    "a missing metric or step": "testing/test_goldens.py::test_what_is_on_one_side_only",
    "a missing platform": "testing/test_goldens.py::test_another_platform",
    "an empty golden": "testing/test_goldens.py::test_an_empty_golden",
    "a golden without a tolerance": "testing/test_goldens.py::test_a_golden_that_proves_nothing",
    "a golden of too few repeats": "testing/test_goldens.py::test_too_few_repeats",
    # other comparators
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


PROMISED = (
    "a wrong gradient",
    "a swapped amax",
    "an off-by-one layer",
    "a stale golden",
    "NaN",
    "silent exit 0",
    "a dead rank",
    "a hung rank",
    "a skipped script",
    "an empty selection",
    "a corrupted fixture",
    "an expired quarantine",
)


@pytest.mark.parametrize("fault", PROMISED)
def test_the_list_holds_what_is_promised(fault):
    assert any(name.startswith(fault) for name in PLANTED)


@pytest.mark.parametrize("place", ["testing/test_goldens.py::test_gone", "testing/test_parity_cases.py::TestAmax::test_gone"])
def test_a_test_that_is_gone_is_missed(place):
    with pytest.raises(AssertionError, match="no test_gone"):
        find(place)
