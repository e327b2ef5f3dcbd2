"""A page whose commands fail, or print something else than it shows, is found out; the pages of docs/ are of the form that can be run."""

import re
import subprocess
from pathlib import Path

import pytest

from nemo_opt.errors import DataError
from nemo_opt.testing import assertions, documented

ROOT = Path(__file__).parents[3]


def page(*blocks):
    return "# Title\n\n" + "\n".join(f"```{language}\n{text}\n```\n" for language, text in blocks)


def faults(*blocks):
    return documented.run(documented.commands(page(*blocks)))


def test_what_is_true():
    assert faults(("bash", "echo 'a  b   7'; echo more"), ("text", "a b ...\nmore"), ("bash", "true")) == []


def test_blocks_share_one_shell():
    assert faults(("bash", 'x=1\nf() { echo "$x"; }'), ("python", "not run"), ("bash", "f"), ("text", "1")) == []


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([("bash", "echo 2"), ("text", "1")], r"(?s)line 3: echo 2\n.*does not print what the page shows:\n1\n--- but:\n2"),
        ([("bash", "echo 1; echo 2"), ("text", "1")], "does not print"),
        ([("bash", "true"), ("text", "1")], "does not print"),
        ([("bash", "echo no >&2; exit 3")], r"(?s)ended with exit code 3, after printing:\nno"),
        ([("bash", "false\necho done")], "ended with exit code 1"),
        ([("bash", "false | true")], "ended with exit code 1"),
        ([("bash", "echo $NOT_SET")], "ended with exit code 1"),
    ],
)
def test_what_is_not(blocks, message):
    (fault,) = faults(*blocks)
    assert re.search(message, fault), fault


def test_what_was_not_reached_is_said_too(tmp_path, monkeypatch):
    monkeypatch.setenv(assertions.VARIABLE, str(tmp_path / "asserted"))
    first, second = faults(("bash", "true"), ("bash", "exit 1"), ("bash", "echo hello"))[-2:]
    assert "exit code 1" in first
    assert second == "line 11: echo hello\n  was not reached"
    assert [(a.what, a.holds) for a in assertions.read(tmp_path / "asserted")] == [("true", True), ("exit 1", False), ("echo hello", False)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Only words\n", "nothing to run"),
        (page(("", "echo 1")), "line 3: a block of language ''"),
        (page(("text", "1")), "line 3: an output that follows no command"),
        (page(("bash", "echo 1")) + "\nWords.\n\n" + page(("text", "1")), "follows no command"),
        (page(("bash", "echo 1"), ("python", "1"), ("text", "1")), "follows no command"),
    ],
)
def test_pages_that_cannot_be_run(text, message):
    if "python" in text:
        text = text.replace("```python\n1\n```\n", "Words.\n")
    with pytest.raises(DataError, match=message):
        documented.commands(text)


def test_command(tmp_path, capfd):
    good = tmp_path / "good.md"
    good.write_text(page(("bash", "echo 1"), ("text", "1")))
    assert documented.main([str(good)]) == 0
    assert "1 of 1 blocks do what the page says" in capfd.readouterr().out
    bad = tmp_path / "bad.md"
    bad.write_text(page(("bash", "echo 2"), ("text", "1")))
    assert documented.main([str(bad)]) == 1
    out, err = capfd.readouterr()
    assert f"{bad}, line 3: echo 2" in err
    assert "0 of 1" in out
    assert documented.main([str(tmp_path / "none.md")]) == 2
    assert "none.md" in capfd.readouterr().err


def test_the_harness_page_can_be_run_and_a_script_runs_it():
    """What it prints is compared by tests/functional/L2_Docs_Harness.sh, with trained fixtures."""
    blocks = documented.commands((ROOT / "docs/harness.md").read_text())
    assert len(blocks) >= 10
    assert sum(block.shown is not None for block in blocks) >= 7
    assert "documented docs/harness.md" in (ROOT / "tests/functional/L2_Docs_Harness.sh").read_text()
    for block in blocks:
        assert subprocess.run(["bash", "-n", "-c", block.code], check=False).returncode == 0, block.code


def test_files_that_the_page_names_are_there():
    text = (ROOT / "docs/harness.md").read_text()
    table = text[text.index("## Where things are") :]
    named = re.findall(r"`([\w./]+)`", table)
    folders = [ROOT, ROOT / "tests/functional", ROOT / "nemo_opt/testing"]
    assert len(named) > 8
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]
