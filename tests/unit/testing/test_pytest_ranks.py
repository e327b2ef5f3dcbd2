"""The plugin as another project would use it: its own folder, its own conftest.py."""

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import os
import pytest

def rank_and_sum(value):
    import torch, torch.distributed as dist
    x = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(x)
    return dist.get_rank(), x.item(), os.getpid()

def fail_on_the_second():
    import torch.distributed as dist
    if dist.get_rank() == 1:
        raise ValueError("planted")

@pytest.mark.ranks
def test_results_come_in_order_of_ranks(ranks):
    assert [result[:2] for result in ranks(2).run(rank_and_sum, 10)] == [(0, 30), (1, 30)]

@pytest.mark.ranks
def test_ranks_stay_warm(ranks):
    assert ranks(2).run(rank_and_sum, 1) == ranks(2).run(rank_and_sum, 1)

@pytest.mark.ranks
def test_a_rank_fails(ranks):
    ranks(2).run(fail_on_the_second)

@pytest.mark.ranks
def test_the_next_one_gets_new_ranks(ranks):
    assert len(ranks(2).run(rank_and_sum, 1)) == 2
"""


@pytest.mark.ranks
def test_another_project_opts_in(pytester):
    pytester.makeconftest('pytest_plugins = ["nemo_opt.testing.pytest_ranks"]')
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("--strict-markers", "-p", "no:cacheprovider", "-p", "no:randomly")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*RankError: rank 1 of 2 Traceback*", "*ValueError: planted*", "FAILED *::test_a_rank_fails *"])


@pytest.mark.ranks
def test_nobody_else_has_the_fixture(pytester):
    """It is no entry point: a project that does not ask for it is left alone."""
    pytester.makepyfile("def test_it(ranks):\n    pass\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'ranks' not found*"])
