"""Memory of a call: what it holds at its highest, also where it has freed it again, and not what was there before."""

import nemo_opt._stack

import pytest
import torch

from nemo_opt.testing.memory import extra_bytes

MIB = 2**20


@pytest.mark.parametrize("size_mib", [64, 128])
def test_the_highest_counts_and_not_what_was_there(size_mib):
    there = torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")

    def call():
        torch.ones(size_mib * MIB, dtype=torch.uint8, device="cuda")
        torch.ones(16 * MIB, dtype=torch.uint8, device="cuda")

    for _ in range(2):
        assert extra_bytes(call) == size_mib * MIB
    assert there.sum() == 32 * MIB


def test_what_a_call_leaves_is_not_the_next_ones():
    kept = []
    for size_mib in (64, 32, 16):
        assert (
            extra_bytes(lambda size_mib=size_mib: kept.append(torch.ones(size_mib * MIB, dtype=torch.uint8, device="cuda")))
            == size_mib * MIB
        )
        kept.clear()
