"""The rules of the house that a reader relies on: which room may know which, module size, documented public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_opt"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Which rooms a room may import at module level, beside itself. Arrows point one way.
FOUNDATION = {"errors", "device", "parallel", "collective", "_stack"}
TOOLS = {"models", "data", "checkpoint", "training"}
ALLOWED = {
    "errors": set(),
    "device": {"errors"},
    "_stack": {"device"},
    "cpu": {"errors", "device"},
    "collective": {"errors"},
    "parallel": FOUNDATION | {"models"},
    **dict.fromkeys(TOOLS, FOUNDATION | TOOLS),
    "pages": set(),
    **dict.fromkeys({"quantize", "prune", "distill"}, FOUNDATION | TOOLS | {"pages"}),
    "api": FOUNDATION | TOOLS | {"quantize", "prune", "distill", "pages"},
    "launch": FOUNDATION,
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _module_level_imports(path: Path) -> set[str]:
    """Imports that run when the module is loaded: not those in functions or under TYPE_CHECKING."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= _imports(node)
    return found


def test_package_has_modules():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_is_short_and_says_what_it_owns(path):
    text = path.read_text()
    assert text.count("\n") <= 500, "over 500 lines: two rooms"
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_arrows_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in ALLOWED:
        return
    rooms = {_room(name) for name in _module_level_imports(path) if name.startswith("nemo_opt.")}
    assert rooms <= ALLOWED[room] | {room, "__version__", ""}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_library_knows_neither_tests_nor_performance_tracking(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in {"testing", "perf", "cli", "scripts"}:
        wrong = [name for name in _imports(ast.parse(path.read_text())) if name.startswith(("nemo_opt.testing", "nemo_opt.perf"))]
        assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_device_knows_the_cpu_backend(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in {"cpu", "device"}:
        assert not [name for name in _imports(ast.parse(path.read_text())) if name.startswith("nemo_opt.cpu")]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_stack_is_activated_before_upstream_is_imported(path):
    names = _module_level_imports(path)
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room != "cpu" and any(name.split(".")[0] in {"megatron", "modelopt"} for name in names):
        assert "nemo_opt._stack" in names, "add `import nemo_opt._stack` above the upstream imports"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare


TORCH_FREE = ["nemo_opt", *(f"nemo_opt.{m}" for m in ("errors", "parallel", "launch", "cli")), *(
    ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE.glob("*/config.py"))]  # fmt: skip


def test_light_modules_load_no_torch():
    code = (
        f"import sys\nfor m in {TORCH_FREE!r}:\n    __import__(m)\n"
        "sys.exit(', '.join(m for m in ('torch', 'megatron', 'modelopt') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
