"""What must answer at once loads no torch: the package, every --help, and every refusal that is known before the ranks start."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "modelopt", "transformers", "matplotlib", "scipy", "pandas")
COMMANDS = [
    "train",
    "import",
    "export",
    "ptq",
    "prune",
    "distill",
    "eval",
    "quickstart",
    "fixtures",
    "fixtures build",
    "suite",
    "suite run",
    "suite list",
    "bench",
    "bench run",
    "bench compare",
    "bench history",
    "bench report",
]

REPORT = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *[m for m in {HEAVY!r} if m in sys.modules], flush=True))
"""


def loaded_by(code: str) -> tuple[int, list[str], str]:
    """Exit code, heavy modules that `code` loads in a fresh process, and all that it prints."""
    done = subprocess.run([sys.executable, "-c", REPORT + code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    marked = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert marked, done.stderr
    return done.returncode, marked[-1].split()[1:], done.stdout + done.stderr


def test_package_and_api():
    code, heavy, _ = loaded_by("import nemo_opt, nemo_opt.api, nemo_opt.launch, nemo_opt.testing.suite, nemo_opt.testing.fixtures")
    assert (code, heavy) == (0, [])


def test_every_help_in_one_process():
    """One process asks for all, to stay fast; the first that loads something would be seen just as well."""
    calls = "".join(
        f"\ntry: main({[*command.split(), '--help']!r})\nexcept SystemExit as e: assert not e.code" for command in ["", *COMMANDS]
    )
    code, heavy, output = loaded_by("from nemo_opt.cli import main" + calls)
    assert (code, heavy) == (0, []), output
    assert output.count("Example:") == len([c for c in COMMANDS if c not in ("fixtures", "suite", "bench")])
    assert "--tp" in output


def test_help_of_scripts():
    names = ("ptq", "gpt_prune", "gpt_train")
    calls = "".join(
        f"\nfrom nemo_opt.scripts.{name} import main as {name}\ntry: {name}(['--help'])\nexcept SystemExit: pass" for name in names
    )
    code, heavy, output = loaded_by(calls)
    assert (code, heavy) == (0, [])
    for flag in ("--calibration_dataset_size", "--target_ffn_hidden_size", "--teacher_path"):
        assert flag in output


REFUSALS = {
    "ptq nowhere out --tp 0": "tp must be a positive integer",
    "ptq nowhere out": "nowhere does not exist",
    "ptq nowhere out --algorithm fp9": "fp9",
    "prune nowhere out --sp": "sp (sequence parallel)",
    "prune nowhere out --devices 0": "devices 0",
    "train out --preset huge --tokenizer x": "unknown model preset 'huge'",
    "train out --preset tiny": "no tokenizer",
    "eval nowhere": "nowhere does not exist",
    "eval nowhere --spec fast": "layer spec 'fast'",
    "distill a b c --steps 0": "max_steps",
    "import nowhere out": "nowhere does not exist",
    "suite run --folder nowhere": "holds no functional script",
    "ptq --frobnicate": "No such option",
}


def test_refusals():
    """Each with exit code 2 and its message, without a traceback and without the stack."""
    calls = "".join(
        f"\nprint('CASE')\ntry: main({arguments.split()!r})\nexcept SystemExit as e: assert e.code == 2, e.code" for arguments in REFUSALS
    )
    code, heavy, output = loaded_by("from nemo_opt.cli import main\nsys.stderr = sys.stdout" + calls)
    assert (code, heavy) == (0, []), output
    assert "Traceback" not in output
    answers = output.split("CASE")[1:]
    assert len(answers) == len(REFUSALS)
    for (arguments, message), answer in zip(REFUSALS.items(), answers, strict=True):
        assert message in answer, f"{arguments}: {answer}"
