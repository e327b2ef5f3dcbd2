"""Calibration rows: whole documents, each token once, and every row on some rank."""

import logging
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.data.calibration import calibration_batches
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.parallel import Topology

EOD = 0
STUB = SimpleNamespace(eod=EOD)


def made(documents, tokenizer=STUB, **sizes):
    return calibration_batches(documents, tokenizer, **({"seq_length": 8, "num_samples": 100} | sizes))


def flat(batches, key="tokens"):
    return torch.cat([batch[key].flatten() for batch in batches]).tolist()


def pieces(batches):
    """Token lists between the bounds."""
    found = []
    for batch in batches:
        size = batch["tokens"].shape[1]
        bounds = batch["cu_seqlens"]
        edges = list(range(0, batch["tokens"].numel() + 1, size)) if bounds is None else bounds.tolist()
        tokens = batch["tokens"].flatten().tolist()
        found += [tokens[start:end] for start, end in pairwise(edges)]
    return found


def test_text_is_packed_with_its_end_of_document(documents, tokenizer):
    batches = made(documents, tokenizer, seq_length=32, num_samples=6, micro_batch_size=2)
    stream = [token for document in documents[:5] for token in [*tokenizer.encode(document), tokenizer.eod]]
    assert [batch["tokens"].shape for batch in batches] == [(2, 32)] * 3
    assert flat(batches) == stream[: 6 * 32]
    assert all(batch["attention_mask"] is None for batch in batches)


def test_a_row_holds_pieces_of_documents_and_positions_restart():
    (first, second) = made([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11, 12, 13]])
    assert first["tokens"].tolist() == [[1, 2, 3, EOD, 4, 5, 6, 7]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert first["cu_seqlens"].tolist() == [0, 4, 8]
    assert first["cu_seqlens"].dtype == torch.int32
    assert second["tokens"].tolist() == [[8, 9, 10, EOD, 11, 12, 13, EOD]]


def test_a_document_that_fills_its_rows_needs_no_bounds():
    batches = made([list(range(1, 24))])
    assert [batch["cu_seqlens"] for batch in batches] == [None] * 3
    assert flat(batches, "position_ids") == [*range(8)] * 3


def test_bounds_count_all_rows_of_a_micro_batch():
    (batch,) = made([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]], micro_batch_size=2)
    assert batch["cu_seqlens"].tolist() == [0, 4, 8, 12, 16]


@given(
    documents=st.lists(st.lists(st.integers(1, 9), max_size=20), min_size=1, max_size=12),
    multiple=st.sampled_from([1, 2, 4]),
    micro_batch_size=st.integers(1, 4),
    dp_size=st.integers(1, 4),
)
def test_every_token_is_counted_once_over_all_ranks(documents, multiple, micro_batch_size, dp_size):
    cut = [[*document, EOD][: (len(document) + 1) // multiple * multiple] for document in documents if document]
    stream = list(chain.from_iterable(cut))
    if len(stream) < 8:
        with pytest.raises(DataError):
            made(documents, multiple=multiple)
        return
    ranks = [
        made(documents, multiple=multiple, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    assert len({tuple(batch["tokens"].shape for batch in batches) for batches in ranks}) == 1  # expert parallel ranks run in step
    assert ranks[0][0]["tokens"].shape[0] <= micro_batch_size
    rows = []
    for step in zip(*ranks, strict=True):
        for batch in step:
            mask = batch["attention_mask"]
            counted = torch.ones_like(batch["tokens"]) if mask is None else mask
            assert set(counted.sum(dim=1).tolist()) <= {0, 8}
            rows += [row.tolist() for row, count in zip(batch["tokens"], counted[:, 0], strict=True) if count]
            assert all(len(piece) % multiple == 0 for piece in pieces([batch]))
    assert list(chain.from_iterable(rows)) == stream[: len(stream) - len(stream) % 8]


def test_rows_are_spread_evenly_and_few_are_repeated():
    """Five rows by at most four on one rank: two steps of three, one place left over; never a second step for a single row."""
    (first, second) = made([list(range(1, 40))], micro_batch_size=4)
    assert first["tokens"].shape == second["tokens"].shape == (3, 8)
    assert first["attention_mask"] is None
    assert second["attention_mask"].tolist() == [[1] * 8, [1] * 8, [0] * 8]
    assert second["tokens"][2].tolist() == first["tokens"][0].tolist()


def test_a_rank_without_a_row_of_its_own_runs_along_masked():
    (batch,) = made([list(range(1, 9))], dp_rank=1, dp_size=2)
    assert batch["tokens"].tolist() == [list(range(1, 9))]
    assert batch["attention_mask"].sum() == 0


def test_padding_repeats_the_document_and_is_marked():
    (short, long) = made([[1, 2, 3], list(range(1, 20))], packing="pad")
    assert short["tokens"].tolist() == [[1, 2, 3, EOD, 1, 2, 3, EOD]]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert short["cu_seqlens"] is None
    assert long["tokens"].tolist() == [list(range(1, 9))]
    assert long["attention_mask"] is None


def test_token_ids_are_taken_as_they_are():
    assert flat(made([[1, 2, 3, 4, 5, 6, 7, EOD], []])) == [1, 2, 3, 4, 5, 6, 7, EOD]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_fewer_rows_than_asked_are_reported(caplog, packing):
    with caplog.at_level(logging.WARNING):
        batches = made([[1, 2, 3, 4, 5, 6, 7]] * 3, packing=packing)
    assert len(batches) == 3
    assert "3 samples of 8 tokens, 100 were asked for" in caplog.text


def test_as_many_rows_as_asked_are_not_reported(caplog):
    made([[1, 2, 3, 4, 5, 6, 7]] * 3, num_samples=3)
    assert not caplog.text


@pytest.mark.parametrize(
    ("documents", "sizes", "error"),
    [
        ([], {}, DataError),
        (["", " "], {}, DataError),
        (["", " "], {"packing": "pad"}, DataError),
        ([[1, 2]], {}, DataError),
        ([[1, 2]], {"num_samples": 0}, ConfigError),
        ([[1, 2]], {"seq_length": 0}, ConfigError),
        ([[1, 2]], {"micro_batch_size": 0}, ConfigError),
        ([[1, 2]], {"dp_rank": 1}, ConfigError),
        ([[1, 2]], {"multiple": 3}, ConfigError),
        ([[1, 2]], {"packing": "cut"}, ConfigError),
    ],
)
def test_no_row_or_a_bad_size_is_an_error(documents, sizes, error):
    with pytest.raises(error):
        made(documents, **sizes)


def _cut(packing, **sizes):
    from nemo_opt.parallel import parallel

    with parallel(Topology(cp=2)):
        try:
            batches = made([[1, 2, 3], list(range(4, 12)), list(range(12, 20))], packing=packing, **sizes)
        except ConfigError as error:
            return str(error)
        keys = ("tokens", "position_ids", "attention_mask")
        return [{key: batch[key] if batch[key] is None else batch[key].tolist() for key in keys} for batch in batches]


@pytest.mark.ranks
def test_context_parallel_ranks_get_two_parts_of_every_piece(ranks):
    first, second = ranks(2).run(_cut, "pack", micro_batch_size=2)
    assert first[0]["tokens"] == [[1, EOD, 4, 7], [8, 11, 12, 15]]
    assert second[0]["tokens"] == [[2, 3, 5, 6], [9, 10, 13, 14]]
    assert first[0]["position_ids"] == [[0, 3, 0, 3], [0, 3, 0, 3]]
    assert second[0]["position_ids"] == [[1, 2, 1, 2], [1, 2, 1, 2]]
    padded = [batches[0] for batches in ranks(2).run(_cut, "pad")]
    assert [batch["tokens"] for batch in padded] == [[[1, 2, 3, EOD]], [[3, EOD, 1, 2]]]
    assert [batch["attention_mask"] for batch in padded] == [[[1, 1, 0, 0]], [[1, 1, 0, 0]]]
    assert all("% (2 * cp 2) != 0" in message for message in ranks(2).run(_cut, "pack", multiple=2))
