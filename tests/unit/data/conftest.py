import pytest

from nemo_opt.data.corpus import builtin_documents
from nemo_opt.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def documents():
    """A part of the built-in corpus, enough for 512 tokens of vocabulary."""
    return builtin_documents()[:40]


@pytest.fixture(scope="session")
def tokenizer(documents, tmp_path_factory):
    return train_tokenizer(documents, 512, tmp_path_factory.mktemp("tokenizer"))
