"""Positions of context-parallel ranks in packed batches."""

import pytest
import torch

from nemo_opt.cpu.transformer_engine.extension import thd_get_partitioned_indices


def test_each_rank_takes_a_chunk_from_both_ends():
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert thd_get_partitioned_indices(bounds, 12, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert thd_get_partitioned_indices(bounds, 12, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


def test_one_rank_takes_everything():
    assert thd_get_partitioned_indices(torch.tensor([0, 5]), 5, 1, 0).tolist() == [0, 1, 2, 3, 4]


def test_a_sequence_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="6 tokens"):
        thd_get_partitioned_indices(torch.tensor([0, 6]), 6, 2, 0)
