"""Every row has tests that are there; and the check fails where it must: it has nothing but planted faults to prove that it looks."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.testing import seed_rows
from nemo_opt.testing.seed_rows import ROWS, SeedRow, faults, main, readme_with, table

ROOT = Path(__file__).parents[3]
NEMO = [
    "tests/export/test_quantizer.py",
    "megatron_gpt_ptq.py",
    "megatron_gpt_prune.py",
    "scripts/llm/gpt_prune.py",
    "llm.prune",
    "L2_NeMo_2_Prune_Llama_TP1PP2.sh",
    "megatron_gpt_distillation.py",
    "L2_NeMo_2_Distill_Llama3_TP1PP2.sh",
    "teacher_provider",
    "MegatronStep.adjust_tensor_shapes_fn",
    "L2_NeMo_2_PTQ_Llama2_FP8_nemo.sh",
    "L2_NeMo_2_PTQ_Unified_Export.sh",
]


def test_every_row_has_tests_that_are_there():
    assert faults(ROWS, ROOT) == []


def test_nothing_of_nemos_is_forgotten():
    assert not set(NEMO) - {name for row in ROWS for name in row.nemo}


def is_there(name):
    """Whether `name` is a module, or a public name of one; the packages load what they offer only when it is used."""
    package, _, last = name.rpartition(".")
    return importlib.util.find_spec(name) is not None or last in dir(importlib.import_module(package))


def test_names_here_exist():
    names = {name for row in ROWS for name in row.here if not name.startswith("nemo-opt ")}
    assert not [name for name in names if not is_there(name)]
    assert not is_there("nemo_opt.prune.prune_language_modell")


def test_readme_is_written_from_the_rows():
    assert main(["--root", str(ROOT)]) == 0, "python -m nemo_opt.testing.seed_rows --write"


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ([], "gpt_ptq.py has no test here"),
        (["tests/unit/quantize/test_quantiser.py::test_it"], "tests/unit/quantize/test_quantiser.py is not there"),
        (["tests/functional/L2_PTQ_Lama.sh"], "tests/functional/L2_PTQ_Lama.sh is not there"),
        (["tests/unit/test_house.py::test_modules_are_long"], "tests/unit/test_house.py has no test_modules_are_long"),
        (["tests/unit/test_house.py::TestHouse::test_modules_are_short"], "tests/unit/test_house.py has no TestHouse"),
        (["tests/unit/test_house.py"], "tests/unit/test_house.py is a whole file"),
        (["tests/unit/test_house.py::_name"], "tests/unit/test_house.py::_name is no test"),
        (["tests/functional/lib.sh::py"], "names a part of a script"),
    ],
    ids=["none", "file", "script", "function", "class", "whole file", "helper", "part of a script"],
)
def test_a_row_without_a_test_is_an_error(tests, fault):
    row = SeedRow(nemo=("gpt_ptq.py",), here=("nemo-opt ptq",), tests=tuple(tests))
    found = faults([*ROWS, row], ROOT)
    assert len(found) == 1
    assert fault in found[0]


def test_a_name_stands_once():
    assert faults([*ROWS, replace(ROWS[0], here=())], ROOT) == ["tests/export/test_quantizer.py stands in 2 rows"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one row, one script and a README without its table."""
    script = tmp_path / "tests/functional/L2_PTQ.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    row = SeedRow(nemo=("ptq.py", "ptq.sh"), here=("nemo-opt ptq",), tests=("tests/functional/L2_PTQ.sh",))
    monkeypatch.setattr(seed_rows, "ROWS", (row,))
    (tmp_path / "README.md").write_text(f"# Title\n\n{seed_rows.BEGIN}\nold\n{seed_rows.END}\n\nMore.\n")
    return tmp_path


def test_the_table_is_compared_and_written(repository, capsys):
    readme = repository / "README.md"
    assert main(["--root", str(repository)]) == 1
    assert "differs from the rows" in capsys.readouterr().out
    assert main(["--root", str(repository), "--write"]) == 0
    assert "| `ptq.py`, `ptq.sh` | `nemo-opt ptq` | [`L2_PTQ.sh`](tests/functional/L2_PTQ.sh) |" in readme.read_text()
    assert readme.read_text().startswith("# Title\n\n")
    assert readme.read_text().endswith("\n\nMore.\n")
    assert main(["--root", str(repository)]) == 0
    readme.write_text(readme.read_text().replace("ptq.sh", "ptq.zsh"))
    assert main(["--root", str(repository)]) == 1


def test_a_wrong_row_is_not_written(repository, capsys):
    before = (repository / "README.md").read_text()
    (repository / "tests/functional/L2_PTQ.sh").unlink()
    assert main(["--root", str(repository), "--write"]) == 1
    assert "L2_PTQ.sh is not there" in capsys.readouterr().out
    assert (repository / "README.md").read_text() == before


@pytest.mark.parametrize("text", ["", seed_rows.BEGIN, seed_rows.END + seed_rows.BEGIN, 2 * (seed_rows.BEGIN + seed_rows.END)])
def test_markers_must_be_there(text):
    with pytest.raises(ConfigError, match="the text needs one line"):
        readme_with(text, ROWS)


def test_a_file_with_several_tests_is_listed_once():
    row = SeedRow(nemo=("a",), here=("b",), tests=("tests/unit/x.py::test_1", "tests/unit/x.py::test_2"))
    assert table([row]).endswith("| `a` | `b` | [`x.py`](tests/unit/x.py) |")
