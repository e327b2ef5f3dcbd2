"""The rules of the house that a reader relies on: which room may know which, module size, documented public names."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

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
    "perf": {"errors", "device", "pages"},
    **dict.fromkeys({"quantize", "prune", "distill"}, FOUNDATION | TOOLS | {"pages"}),
    "api": FOUNDATION | TOOLS | {"quantize", "prune", "distill", "pages"},
    "forked": {"errors"},
    "stacks": set(),
    "launch": FOUNDATION | {"forked", "stacks"},
}


TREES = {path: ast.parse(path.read_text()) for path in MODULES}  # parsed once: every rule below looks at every module


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@cache
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
    for node in TREES[path].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= _imports(node)
    return found


def _forbidden(prefixes: str | tuple[str, ...], rooms: set[str]) -> dict[str, list[str]]:
    """Modules outside `rooms` that import a name with one of the prefixes, anywhere in their text."""
    found = {
        _name(path): [n for n in _imports(tree) if n.startswith(prefixes)] for path, tree in TREES.items() if _room_of(path) not in rooms
    }
    return {name: wrong for name, wrong in found.items() if wrong}


def test_package_has_modules():
    assert len(MODULES) > 20


def test_modules_are_short():
    assert not [_name(path) for path in MODULES if path.read_text().count("\n") > 500], "over 500 lines: two rooms"


def test_modules_say_what_they_own():
    assert not [_name(path) for path, tree in TREES.items() if not ast.get_docstring(tree)], "no module docstring"


def test_arrows_point_one_way():
    wrong = {}
    for path in MODULES:
        room = _room_of(path)
        if room in ALLOWED:
            rooms = {_room(name) for name in _module_level_imports(path) if name.startswith("nemo_opt.")}
            wrong[_name(path)] = rooms - ALLOWED[room] - {room, "__version__", ""}
    assert len(wrong) > 20
    assert not {name: rooms for name, rooms in wrong.items() if rooms}


def test_library_knows_neither_tests_nor_performance_tracking():
    assert not _forbidden(("nemo_opt.testing", "nemo_opt.perf"), {"testing", "perf", "cli", "scripts"})


def test_only_device_knows_the_cpu_backend():
    assert not _forbidden("nemo_opt.cpu", {"cpu", "device"})


def test_stack_is_activated_before_upstream_is_imported():
    wrong = []
    for path in MODULES:
        names = _module_level_imports(path)
        upstream = any(name.split(".")[0] in {"megatron", "modelopt"} for name in names)
        if _room_of(path) != "cpu" and upstream and "nemo_opt._stack" not in names:
            wrong.append(_name(path))
    assert not wrong, "add `import nemo_opt._stack` above the upstream imports"


def test_public_names_are_documented():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [(path, n) for path, tree in TREES.items() for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert len(public) > 100
    assert not [f"{_name(path)}: {node.name}" for path, node in public if not ast.get_docstring(node)]


TORCH_FREE = ["nemo_opt", *(f"nemo_opt.{m}" for m in ("errors", "parallel", "launch", "cli")), *(
    ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE.glob("*/config.py"))]  # fmt: skip


def test_light_modules_load_no_torch():
    code = (
        f"import sys\nfor m in {TORCH_FREE!r}:\n    __import__(m)\n"
        "sys.exit(', '.join(m for m in ('torch', 'megatron', 'modelopt') if m in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
