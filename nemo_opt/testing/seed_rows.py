"""Where NeMo's own tests and scripts went: each of them by row, with its place here and the tests that hold it there.

The table in README is written from these rows: `python -m nemo_opt.testing.seed_rows --write`; without `--write` it is compared, and a
difference is an error. A row without a test, or one that names a test which is not there, is an error too. Tests are found in their source,
so that looking takes no time: `tests/unit/FILE.py::Class::test_name`, or a functional script `tests/functional/L2_NAME.sh`.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_opt.errors import ConfigError

__all__ = ["ROWS", "SeedRow", "faults", "main", "readme_with", "table"]

BEGIN, END = "<!-- seed rows: python -m nemo_opt.testing.seed_rows --write -->", "<!-- end of seed rows -->"

_UNIT, _L2 = "tests/unit/", "tests/functional/"


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """Something of NeMo's that must work here."""

    nemo: tuple[str, ...]
    """Its names there: files, functions, scripts."""
    here: tuple[str, ...]
    """Names here: dotted Python names, `nemo-opt COMMAND`s. Scripts stand in `tests` only."""
    tests: tuple[str, ...]
    """Tests and functional scripts, from the repository's root."""


ROWS = (
    SeedRow(
        nemo=("tests/export/test_quantizer.py",),
        here=("nemo_opt.quantize.quantizer",),
        tests=(_UNIT + "quantize/test_quantizer.py::TestQuantizerAsNeMoTestsIt::test_quantize_method",),
    ),
    SeedRow(
        nemo=("megatron_gpt_ptq.py",),
        here=("nemo_opt.quantize.Quantizer", "nemo-opt ptq"),
        tests=(
            _UNIT + "api/test_api.py::test_ptq",
            _UNIT + "quantize/test_quantizer.py::test_export_writes_a_checkpoint_that_names_the_algorithm",
            _L2 + "L2_PTQ_Sweep_TP2PP1.sh",
            _L2 + "L2_PTQ_Sweep_TP1PP2.sh",
        ),
    ),
    SeedRow(
        nemo=("megatron_gpt_prune.py",),
        here=("nemo_opt.prune.prune_language_model",),
        tests=(
            _UNIT + "prune/test_pruner.py::test_layers_are_dropped_without_data",
            _UNIT + "prune/test_pruner.py::test_forward_loop_is_passed_on_and_what_is_best_stays",
            _L2 + "L2_Prune_Llama_DropLayers_TP1PP2.sh",
            _L2 + "L2_Prune_Llama_TP2PP1_width.sh",
        ),
    ),
    SeedRow(
        nemo=("scripts/llm/gpt_prune.py",),
        here=("nemo_opt.scripts.gpt_prune",),
        tests=(_UNIT + "scripts/test_scripts.py::TestPrune::test_nemos_flags", _L2 + "L2_Prune_Llama_68M_TP1PP2.sh"),
    ),
    SeedRow(
        nemo=("llm.prune",),
        here=("nemo_opt.api.prune", "nemo_opt.prune.save_pruned_model", "nemo-opt prune"),
        tests=(_UNIT + "api/test_api.py::test_prune", _UNIT + "prune/test_pruner.py::test_saving_records_the_pruned_sizes"),
    ),
    SeedRow(
        nemo=("L2_NeMo_2_Prune_Llama_TP1PP2.sh",),
        here=("nemo_opt.scripts.gpt_prune",),
        tests=(_L2 + "L2_Prune_Llama_TP1PP2.sh", _L2 + "L2_Prune_Llama_68M_TP1PP2.sh"),
    ),
    SeedRow(
        nemo=("megatron_gpt_distillation.py",),
        here=("nemo_opt.distill.adjust_distillation_model_for_mcore", "nemo-opt distill"),
        tests=(
            _UNIT + "distill/test_adjust.py::test_nemos_sequence_of_calls",
            _UNIT + "distill/test_convert.py::test_teacher_may_be_a_provider",
            _UNIT + "api/test_api.py::test_distill",
        ),
    ),
    SeedRow(
        nemo=("L2_NeMo_2_Distill_Llama3_TP1PP2.sh", "scripts/llm/gpt_train.py"),
        here=("nemo_opt.scripts.gpt_train",),
        tests=(
            _UNIT + "scripts/test_scripts.py::TestTrain::test_distillation",
            _L2 + "L2_Distill_Llama3_TP1PP2.sh",
            _L2 + "L2_Distill_Llama3_TP2PP1.sh",
            _L2 + "L2_TwoNodes_Distill.sh",
        ),
    ),
    SeedRow(
        nemo=("teacher_provider",),
        here=("nemo_opt.distill.teacher_provider",),
        tests=(_UNIT + "distill/test_provider.py::test_teacher_has_its_weights_and_is_frozen",),
    ),
    SeedRow(
        nemo=("MegatronStep.adjust_tensor_shapes_fn",),
        here=("nemo_opt.training.MegatronStep", "nemo_opt.distill.get_tensor_shapes_adjust_fn_for_distillation"),
        tests=(
            _UNIT + "training/test_step.py::test_property_asks_distillation_with_the_arguments_of_the_step",
            _UNIT + "training/test_step.py::test_pipelines_get_the_function_by_themselves",
            _UNIT + "distill/test_adjust.py::test_nemos_positional_arguments",
        ),
    ),
    SeedRow(
        nemo=("L2_NeMo_2_PTQ_Llama2_FP8_nemo.sh", "scripts/llm/ptq.py"),
        here=("nemo_opt.scripts.ptq",),
        tests=(
            _UNIT + "scripts/test_scripts.py::TestPtq::test_nemos_defaults",
            _L2 + "L2_PTQ_Llama_FP8_TP2PP1.sh",
            _L2 + "L2_PTQ_Llama_FP8_TP1PP2.sh",
        ),
    ),
    SeedRow(
        nemo=("L2_NeMo_2_PTQ_Llama2_FP8_trtllm.sh",),
        here=("nemo_opt.scripts.ptq",),
        tests=(_L2 + "L2_PTQ_Llama_FP8_trtllm.sh",),
    ),
    SeedRow(
        nemo=("L2_NeMo_2_PTQ_Unified_Export.sh",),
        here=("nemo_opt.scripts.ptq", "nemo-opt import"),
        tests=(_L2 + "L2_PTQ_Unified_Export.sh", _UNIT + "scripts/test_scripts.py::TestPtq::test_export_formats"),
    ),
)
"""The ten rows of NeMo's tests and callers of the five functions, in their order, and the rest of the family of L2 scripts."""


def faults(rows: Sequence[SeedRow], root: Path) -> list[str]:
    """What is wrong with `rows` in the repository at `root`: no test, a test that is not there, a name that stands twice."""
    found = [f"{', '.join(row.nemo)} has no test here" for row in rows if not row.tests]
    found += [f"{', '.join(row.nemo)}: {fault}" for row in rows for test in row.tests if (fault := _fault(test, root))]
    names = [name for row in rows for name in row.nemo]
    return found + [f"{name} stands in {names.count(name)} rows" for name in dict.fromkeys(names) if names.count(name) > 1]


def _fault(test: str, root: Path) -> str:
    """Why `test` is none; empty if it is one."""
    name, *parts = test.split("::")
    path = root / name
    if not path.is_file():
        return f"{name} is not there"
    if path.suffix == ".sh":
        return f"{test} names a part of a script" if parts else ""
    if not parts:
        return f"{test} is a whole file: name a test in it"
    scope: ast.AST = ast.parse(path.read_text())
    for part in parts:
        below = [n for n in ast.iter_child_nodes(scope) if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part]
        if not below:
            return f"{name} has no {part}"
        scope = below[-1]
    return "" if isinstance(scope, ast.FunctionDef) and parts[-1].startswith("test") else f"{test} is no test"


def table(rows: Sequence[SeedRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| NeMo | here | tests |", "|---|---|---|"]
    return "\n".join(lines + [f"| {_code(row.nemo)} | {_code(row.here)} | {_tests(row.tests)} |" for row in rows])


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _tests(tests: Sequence[str]) -> str:
    """Their files, each once, with a link."""
    paths = dict.fromkeys(test.partition("::")[0] for test in tests)
    return ", ".join(f"[`{path.removeprefix(_UNIT).removeprefix(_L2)}`]({path})" for path in paths)


def readme_with(text: str, rows: Sequence[SeedRow]) -> str:
    """README's `text` with the table of `rows` between its markers.

    Raises:
        ConfigError: The markers are not there, once and in order.

    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"the text needs one line {BEGIN!r} and after it one line {END!r}")
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares or writes the table; returns the exit code."""
    parser = argparse.ArgumentParser("python -m nemo_opt.testing.seed_rows", description="Where NeMo's own tests and scripts went")
    parser.add_argument("--write", action="store_true", help="rewrite the table in README instead of comparing it")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository (here by default)")
    options = parser.parse_args(arguments)
    readme = options.root / "README.md"
    found = faults(ROWS, options.root)
    old = readme.read_text()
    new = readme_with(old, ROWS)
    if options.write and not found:
        readme.write_text(new)
    elif new != old:
        found.append(f"{readme} differs from the rows: run python -m nemo_opt.testing.seed_rows --write")
    print("\n".join(found) or f"{len(ROWS)} rows, {sum(len(row.tests) for row in ROWS)} tests")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
