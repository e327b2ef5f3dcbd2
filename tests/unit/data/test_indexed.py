import nemo_opt._stack

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_opt.data.indexed import build_indexed
from nemo_opt.data.sources import read_index_header
from nemo_opt.errors import DataError


def test_documents_come_back_with_their_end(documents, tokenizer, tmp_path):
    prefix = build_indexed(documents[:5], tokenizer, tmp_path / "deep" / "d")
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == 5
    for document, ids in zip(documents, dataset[:], strict=False):
        assert ids.tolist() == [*tokenizer.encode(document), tokenizer.eod]
    assert dataset.document_indices.tolist() == list(range(6))
    assert dataset.index.dtype == np.uint16
    header = read_index_header(prefix)
    assert (header.num_sequences, header.num_tokens, header.item_bytes) == (5, int(dataset.sequence_lengths.sum()), 2)


def test_same_documents_give_the_same_files(documents, tokenizer, tmp_path):
    one, two = (build_indexed(iter(documents[:3]), tokenizer, tmp_path / name) for name in "ab")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes(), (one, two)


@pytest.mark.parametrize("nothing", [[], ["", " \n"]])
def test_nothing_is_refused_and_leaves_nothing(tokenizer, tmp_path, nothing):
    with pytest.raises(DataError, match="no document with text"):
        build_indexed(nothing, tokenizer, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_pair_whole(documents, tokenizer, tmp_path):
    build_indexed(documents[:2], tokenizer, tmp_path / "d")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def failing():
        yield documents[0]
        raise DataError("line 2 is malformed")

    with pytest.raises(DataError, match="line 2"):
        build_indexed(failing(), tokenizer, tmp_path / "d")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
