import json
from collections import Counter

import nemo_opt._stack

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_opt.data.config import DataConfig
from nemo_opt.data.datasets import _publish, build_datasets
from nemo_opt.data.indexed import build_indexed
from nemo_opt.data.sources import read_index_header
from nemo_opt.errors import ConfigError, DataError

SEQ = 16


@pytest.fixture
def prefix(documents, tokenizer, tmp_path):
    return build_indexed(documents, tokenizer, tmp_path / "d")


def config(tmp_path, *paths, **changes):
    settings = {"paths": [str(path) for path in paths] or None, "seq_length": SEQ, "index_mapping_dir": str(tmp_path / "cache")}
    return DataConfig(**(settings | changes))


def tokens(dataset):
    return torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])


def test_samples_are_shifted_text(prefix, tokenizer, tmp_path):
    train, valid = build_datasets(config(tmp_path, prefix, split="9,1"), tokenizer, 20, 10)
    assert len(train) >= 20
    assert len(valid) >= 10
    for sample in (train[0], train[19], valid[3]):
        assert {name: tuple(value.shape) for name, value in sample.items()} == dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids"), (SEQ,)
        )
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["position_ids"].tolist() == list(range(SEQ))
        assert sample["loss_mask"].all()


def test_one_epoch_holds_all_training_text_and_no_validation_text(prefix, tokenizer, tmp_path):
    whole = IndexedDataset(str(prefix))
    train_tokens = int(whole.sequence_lengths[:20].sum())
    train, _ = build_datasets(config(tmp_path, prefix, split="1,1,0"), tokenizer, (train_tokens - 1) // SEQ)
    assert len(train) == (train_tokens - 1) // SEQ
    expected = Counter(token for i in range(20) for token in whole[i].tolist())
    assert not Counter(tokens(train).flatten().tolist()) - expected


def test_order_is_given_by_the_seed(prefix, tokenizer, tmp_path):
    one, again, other = (build_datasets(config(tmp_path, prefix, seed=seed), tokenizer, 30)[0] for seed in (1, 1, 2))
    assert torch.equal(tokens(one), tokens(again))
    assert not torch.equal(tokens(one)[:30], tokens(other)[:30])


def test_no_validation_gives_none(prefix, tokenizer, tmp_path):
    assert build_datasets(config(tmp_path, prefix, split="1"), tokenizer, 5)[1] is None


def test_text_is_tokenised_once(documents, tokenizer, tmp_path, prefix):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    from_text, _ = build_datasets(config(tmp_path, file), tokenizer, 30)
    from_prefix, _ = build_datasets(config(tmp_path, prefix), tokenizer, 30)
    assert torch.equal(tokens(from_text), tokens(from_prefix))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tokens").iterdir()}
    build_datasets(config(tmp_path, file), tokenizer, 10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "tokens").iterdir()} == made


def test_a_rebuilt_dataset_is_not_read_through_old_indices(documents, tokenizer, tmp_path, prefix):
    build_datasets(config(tmp_path, prefix), tokenizer, 30)
    build_indexed(documents[5:25], tokenizer, prefix)
    rebuilt, _ = build_datasets(config(tmp_path, prefix), tokenizer, 30)
    fresh, _ = build_datasets(config(tmp_path, prefix, index_mapping_dir=str(tmp_path / "other")), tokenizer, 30)
    assert torch.equal(tokens(rebuilt), tokens(fresh))


def test_cache_appears_whole_or_not_at_all(prefix, tokenizer, tmp_path):
    build_datasets(config(tmp_path, prefix), tokenizer, 30)
    build_datasets(config(tmp_path, prefix), tokenizer, 30)
    (made,) = (tmp_path / "cache" / "indices").iterdir()
    assert not made.name.startswith(".")
    assert len(list(made.glob("*.npy"))) == 3


def test_two_runs_that_build_the_same_cache_at_once(tmp_path):
    """The second to finish drops its own; a rename that fails for another reason is not swallowed."""
    final, mine = tmp_path / "final", tmp_path / "mine"
    for directory in (final, mine):
        directory.mkdir()
        (directory / "index.npy").write_text(directory.name)
    _publish(mine, final)
    assert not mine.exists()
    assert (final / "index.npy").read_text() == "final"
    with pytest.raises(FileNotFoundError):
        _publish(mine, tmp_path / "other")


def two_prefixes(documents, tokenizer, tmp_path):
    """Datasets told apart by their documents: the second is three times the size of the first."""
    parts = documents[:8], documents[8:32]
    return [build_indexed(part, tokenizer, tmp_path / f"part{i}") for i, part in enumerate(parts)]


def shares(dataset, count):
    drawn = Counter(int(dataset[i]["dataset_id"]) for i in range(count))
    return [drawn[i] / count for i in range(2)]


def test_weights_are_kept(documents, tokenizer, tmp_path):
    a, b = two_prefixes(documents, tokenizer, tmp_path)
    train, valid = build_datasets(config(tmp_path, 3.0, a, 1.0, b, split="7,3"), tokenizer, 200, 40)
    assert shares(train, 200) == pytest.approx([0.75, 0.25], abs=0.01)
    assert shares(valid, 40) == pytest.approx([0.75, 0.25], abs=0.05)


def test_bare_prefixes_are_weighed_by_tokens_for_as_many_samples_as_asked(documents, tokenizer, tmp_path):
    a, b = two_prefixes(documents, tokenizer, tmp_path)
    counts = [read_index_header(path).num_tokens for path in (a, b)]
    asked = 3 * sum(counts) // 64  # three epochs
    train, _ = build_datasets(config(tmp_path, a, b, seq_length=64), tokenizer, asked)
    assert len(train) >= asked
    assert shares(train, asked) == pytest.approx([count / sum(counts) for count in counts], abs=0.01)


def test_mock_data_is_counting(tokenizer, tmp_path):
    train, valid = build_datasets(config(tmp_path, mock=True), tokenizer, 4, 2)
    steps = train[0]["tokens"].diff()
    assert (steps == 1).sum() >= SEQ - 4
    assert len(valid) >= 2


@pytest.mark.parametrize(
    ("changes", "samples", "error", "message"),
    [
        ({}, (0, 0), ConfigError, "train_samples 0"),
        ({}, (1, -1), ConfigError, "valid_samples -1"),
        ({"split": "1,0"}, (1, 1), ConfigError, "no validation share"),
        ({"split": "999,1"}, (1, 1), DataError, "validation share has 0 tokens in 0 of 40 documents"),
        ({"seq_length": 10**6}, (1, 0), DataError, "seq_length \\+ 1 = 1000001"),
        ({"paths": ["nowhere"]}, (1, 0), DataError, "missing: nowhere.idx"),
    ],
)
def test_bad_requests_are_refused(prefix, tokenizer, tmp_path, changes, samples, error, message):
    with pytest.raises(error, match=message):
        build_datasets(config(tmp_path, prefix, **changes), tokenizer, *samples)


def test_test_share_without_documents_does_not_hang(prefix, tokenizer, tmp_path):
    """Megatron counts epochs of an empty split for ever."""
    assert build_datasets(config(tmp_path, prefix, split="98,1.9,0.1", seq_length=8), tokenizer, 5)[1] is None


def test_another_tokenizer_is_refused(prefix, documents, tmp_path):
    from nemo_opt.data.tokenizer import train_tokenizer

    smaller = train_tokenizer(documents, 300, tmp_path / "smaller")
    with pytest.raises(DataError, match="has 300 tokens"):
        build_datasets(config(tmp_path, prefix), smaller, 5)


def build_on_ranks(data, tokenizer_dir):
    from nemo_opt.data.tokenizer import load_tokenizer

    try:
        train, valid = build_datasets(data, load_tokenizer(tokenizer_dir), 20, 4)
    except DataError as error:
        return str(error)
    return tokens(train), tokens(valid)


@pytest.mark.ranks
def test_every_rank_sees_the_same_samples(ranks, documents, tokenizer, tmp_path):
    """Text, two sources and an empty cache: rank 0 makes the files, the other reads them."""
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(document.replace("\n\n", "\n") for document in documents[:20]))
    other = build_indexed(documents[20:], tokenizer, tmp_path / "other")
    data = config(tmp_path, 2.0, file, 1.0, other, split="7,3")
    one, two = ranks(2).run(build_on_ranks, data, tokenizer.path)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, two, strict=True))
    here = build_datasets(data, tokenizer, 20, 4)
    assert all(torch.equal(mine, tokens(alone)) for mine, alone in zip(one, here, strict=True))


@pytest.mark.ranks
def test_bad_data_is_refused_on_every_rank(ranks, tokenizer, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"text": 3}\n')
    one, two = ranks(2).run(build_on_ranks, config(tmp_path, file), tokenizer.path)
    assert one == two
    assert "bad.jsonl:2" in one
