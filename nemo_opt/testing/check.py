"""Assertions on the numbers in a JSON result: `python -m nemo_opt.testing.check RESULT.json 'loss_after < loss_before + 0.05' ...`.

For shell scripts, which must assert numbers and not an exit code. An expression sees the result's entries as names, entries of nested
objects by dots (`model_after.hidden_size`), and with `--with NAME=FILE` other results under a name. A JUnit XML file is a result too: its
entries are tests, passed, failed, errors and skipped. Allowed are numbers, strings, None, lists, comparisons, arithmetic, and/or/not, and
abs, len, max, min, round; everything else is refused, and so is a comparison with NaN, which would be silently false or, negated, silently
true. Exit codes: 0 all hold, 1 one does not, 2 an expression or a file is wrong. Each verdict is recorded (`nemo_opt.testing.assertions`).
"""

import argparse
import ast
import json
import math
import operator
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_opt.errors import ConfigError
from nemo_opt.testing.assertions import record

__all__ = ["evaluate", "main"]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_JUNIT = {"failed": "failure", "errors": "error", "skipped": "skipped"}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "len": len, "max": max, "min": min, "round": round}


def evaluate(expression: str, names: dict[str, Any]) -> Any:
    """The value of `expression` over `names`.

    Raises:
        ConfigError: It is no expression of the allowed kind, or names something that is not there.

    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"{expression!r} is not an expression: {error.msg}") from None
    try:
        return _value(tree.body, names)
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{expression!r} cannot be computed: {error}") from None


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name():
            return _look_up(node.id, names, "result")
        case ast.Attribute():
            return _look_up(node.attr, _value(node.value, names), ast.unparse(node.value))
        case ast.List() | ast.Tuple():
            return [_value(item, names) for item in node.elts]
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(node.left, names), _value(node.right, names))
        case ast.UnaryOp(op=op) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(node.operand, names))
        case ast.BoolOp(op=ast.And()):
            return all(_value(item, names) for item in node.values)
        case ast.BoolOp():
            return any(_value(item, names) for item in node.values)
        case ast.Compare():
            return _compare(node, names)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*[_value(argument, names) for argument in node.args])
    raise ConfigError(f"{ast.unparse(node)!r} is not allowed in a check")


def _compare(node: ast.Compare, names: dict[str, Any]) -> bool:
    values = [_value(operand, names) for operand in (node.left, *node.comparators)]
    for operand, value in zip((node.left, *node.comparators), values, strict=True):
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{ast.unparse(operand)} is NaN, which no comparison can judge")
    for op, left, right in zip(node.ops, values, values[1:], strict=False):
        if type(op) not in _OPERATORS:
            raise ConfigError(f"{ast.unparse(node)!r} is not allowed in a check")
        if not _OPERATORS[type(op)](left, right):
            return False
    return True


def _look_up(name: str, container: Any, owner: str) -> Any:
    if not isinstance(container, dict) or name not in container:
        known = f"; there are {sorted(container)}" if isinstance(container, dict) else ""
        raise ConfigError(f"{owner} has no entry {name!r}{known}")
    return container[name]


def _values(expression: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the names in `expression` stand for."""
    found = {}
    for node in ast.walk(ast.parse(expression.strip(), mode="eval")):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) not in _FUNCTIONS:
            value = _value(node, names)
            if not isinstance(value, dict):
                found[ast.unparse(node)] = value
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        values = _read_junit(path) if path.endswith(".xml") else json.loads(Path(path).read_text())
    except (OSError, ValueError, ET.ParseError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _read_junit(path: str) -> dict[str, int]:
    """Counts of the tests of a JUnit XML file."""
    cases = [{element.tag for element in case} for case in ET.parse(path).iter("testcase")]  # noqa: S314 - pytest has just written it
    counts = {name: sum(tag in case for case in cases) for name, tag in _JUNIT.items()}
    return {"tests": len(cases), "passed": sum(case.isdisjoint(_JUNIT.values()) for case in cases)} | counts


def _read_all(result: str, others: list[str]) -> dict[str, Any]:
    names = _read(result)
    for other in others:
        name, _, path = other.partition("=")
        names[name] = _read(path)
    return names


def main(arguments: list[str] | None = None) -> int:
    """Checks every expression, printing each with its values; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.check", description="Assert numbers of a JSON result")
    parser.add_argument("result", help="JSON file with an object")
    parser.add_argument("expressions", nargs="+", help="Expressions that must be true")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="NAME=FILE", help="Another result, by a name")
    options = parser.parse_intermixed_args(arguments)
    source = Path(options.result).stem
    try:
        names = _read_all(options.result, options.others)
    except ConfigError as error:
        return _refuse("the results can be read", error, source)
    failed = 0
    for expression in options.expressions:
        try:
            holds, values = evaluate(expression, names) is True, _values(expression, names)
        except ConfigError as error:
            return _refuse(expression, error, source)
        failed += not holds
        record("check", expression, holds, values, source=source)
        print(f"{'ok  ' if holds else 'FAIL'} {expression}   ({', '.join(f'{name} = {value!r}' for name, value in values.items())})")
    return 1 if failed else 0


def _refuse(what: str, error: ConfigError, source: str) -> int:
    record("check", what, False, {"error": str(error)}, source=source)
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
