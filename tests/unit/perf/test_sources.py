"""What a record says of the sources it measured."""

import subprocess

import pytest

from nemo_opt.perf.sources import Sources, sources


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
        )

    git("init", "-q")
    (tmp_path / "module.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first\n\nmore")
    return tmp_path


def test_a_clean_tree(repository):
    found = sources(repository)
    assert (len(found.commit), found.dirty, found.subject) == (40, False, "first")


@pytest.mark.parametrize(
    ("file", "dirty"), [("module.py", True), ("new.py", True), ("benchmarks/history/here/1.json", False), ("benchmarks/history.py", True)]
)
def test_what_makes_it_dirty(repository, file, dirty):
    """A record of an earlier run does not: it is what runs leave."""
    (repository / file).parent.mkdir(parents=True, exist_ok=True)
    (repository / file).write_text("2")
    assert sources(repository).dirty is dirty


def test_no_repository(tmp_path):
    assert sources(tmp_path / "nowhere") == Sources(commit="", dirty=False, subject="")
