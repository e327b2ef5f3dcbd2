import pytest
import torch

from nemo_opt.data.batches import batches, cp_slice
from nemo_opt.errors import ConfigError, DataError

SEQ = 6


class Counting(torch.utils.data.Dataset):
    """Sample i holds the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        tokens = torch.full((SEQ,), index)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(SEQ), "position_ids": torch.arange(SEQ)}


def drawn(iterator):
    return [batch["tokens"][:, 0].tolist() for batch in iterator]


def test_shapes():
    batch = next(batches(Counting(8), micro_batch_size=2))
    assert batch["attention_mask"] is None
    assert {name: tuple(batch[name].shape) for name in ("tokens", "labels", "loss_mask", "position_ids")} == dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids"), (2, SEQ)
    )
    assert torch.equal(batch["labels"], batch["tokens"] + 1)


def test_order_on_one_rank_leaves_out_the_incomplete_step():
    assert drawn(batches(Counting(7), micro_batch_size=2)) == [[0, 1], [2, 3], [4, 5]]


def test_ranks_share_each_step():
    ranks = [drawn(batches(Counting(13), micro_batch_size=2, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert ranks == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_global_batch_holds_the_same_samples_on_every_layout(dp_size):
    """Global batch 8 at micro-batch 2: the first 4 / dp_size micro-batches of all ranks."""
    ranks = [drawn(batches(Counting(16), micro_batch_size=2, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert sorted(sample for rank in ranks for part in rank[: 4 // dp_size] for sample in part) == list(range(8))


def test_resumed_is_uninterrupted():
    whole = drawn(batches(Counting(20), micro_batch_size=2, dp_rank=1, dp_size=2))
    assert drawn(batches(Counting(20), micro_batch_size=2, dp_rank=1, dp_size=2, start_sample=8)) == whole[2:]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"micro_batch_size": 0}, ConfigError),
        ({"micro_batch_size": 2, "dp_rank": 2, "dp_size": 2}, ConfigError),
        ({"micro_batch_size": 2, "start_sample": 3}, ConfigError),
        ({"micro_batch_size": 2, "start_sample": -2}, ConfigError),
        ({"micro_batch_size": 2, "start_sample": 8}, DataError),
        ({"micro_batch_size": 16}, DataError),
    ],
)
def test_what_does_not_fit_is_refused_at_once(arguments, error):
    with pytest.raises(error):
        batches(Counting(8), **arguments)


def test_without_context_parallelism_the_batch_is_left_alone():
    batch = {"tokens": torch.zeros(1, 5)}
    assert cp_slice(batch) is batch


def sliced(size, seq_length):
    from nemo_opt.parallel import Topology, parallel

    class Sequential(Counting):
        def __getitem__(self, index):
            return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.arange(seq_length))

    with parallel(Topology(cp=size)):
        try:
            return next(batches(Sequential(2), micro_batch_size=1))["position_ids"].tolist()
        except ConfigError as error:
            return str(error)


@pytest.mark.ranks
def test_context_parallel_ranks_get_their_zigzag_pieces(ranks):
    assert ranks(2).run(sliced, 2, 8) == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    assert all("seq_length 6 % (2 * cp 2) != 0" in message for message in ranks(2).run(sliced, 2, 6))
