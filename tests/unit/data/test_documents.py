from itertools import islice

import nemo_opt._stack

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_opt.data.config import DataConfig
from nemo_opt.data.documents import training_documents
from nemo_opt.data.indexed import build_indexed
from nemo_opt.errors import ConfigError, DataError

SEQ = 16


@pytest.fixture
def prefix(documents, tokenizer, tmp_path):
    return build_indexed(documents, tokenizer, tmp_path / "d")


def config(tmp_path, *paths, **changes):
    settings = {"paths": [str(path) for path in paths] or None, "seq_length": SEQ, "index_mapping_dir": str(tmp_path / "cache")}
    return DataConfig(**(settings | changes))


def test_every_training_document_comes_once_and_no_other(prefix, tokenizer, tmp_path):
    whole = IndexedDataset(str(prefix))
    found = list(training_documents(config(tmp_path, prefix, split="1,1,0"), tokenizer))
    expected = [whole[i].tolist() for i in range(len(whole) // 2)]
    assert sorted(found) == sorted(expected)
    assert found != expected, "in random order"


def test_order_is_given_by_the_seed(prefix, tokenizer, tmp_path):
    one, again, other = (list(training_documents(config(tmp_path, prefix, seed=seed), tokenizer)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other)


def test_sources_take_turns_by_weight(tokenizer, tmp_path):
    many = build_indexed(["other words"] * 800, tokenizer, tmp_path / "many")
    marked = build_indexed(["mark"] * 400, tokenizer, tmp_path / "marked")
    opened = IndexedDataset(str(marked))  # kept: what it gives are views of its file
    mark = opened[0].tolist()
    blend = config(tmp_path, "3", many, "1", marked, split="1")
    first = list(islice(training_documents(blend, tokenizer), 400))
    share = sum(document == mark for document in first) / len(first)
    assert 0.15 < share < 0.35, "a quarter; 0.05 is more than two standard deviations of 400 draws"
    everything = list(training_documents(blend, tokenizer))
    assert len(everything) == 800 + 400, "a source that ends leaves the rest to the other"


def test_text_files_are_tokenised(documents, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents[:3]))
    found = list(training_documents(config(tmp_path, path, split="1"), tokenizer))
    assert found
    assert all(document[-1] == tokenizer.eod for document in found)


def test_mock_and_missing_data_are_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="mock data has no documents"):
        training_documents(config(tmp_path, mock=True), tokenizer)
    with pytest.raises((ConfigError, DataError), match="none"):
        training_documents(config(tmp_path, tmp_path / "none"), tokenizer)
