"""All checks, in the order in which they are cheap: lint, format, types, layers, size budget, tests.

uv run python scripts/check.py            everything
uv run python scripts/check.py --fast     without tests that start processes, need the model or take minutes
uv run python scripts/check.py -- -k pool everything, pytest with these arguments
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES = 500
FUNCTION_LINES = 60
NESTING = 3
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--fast", action="store_true", help="skip tests that start processes, need the model or take minutes"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    options = parser.parse_args()
    selection = ["-m", "not processes and not model and not long"] if options.fast else []
    steps: list[tuple[str, list[str]]] = [
        ("lint", ["ruff", "check", "."]),
        ("format", ["ruff", "format", "--check", "."]),
        ("types", ["mypy"]),
        ("layers", ["lint-imports"]),
    ]
    for name, command in steps:
        if not run(name, command):
            return 1
    broken = list(over_budget())
    print("\n".join(broken) if broken else "== size budget kept", flush=True)
    if broken:
        return 1
    return 0 if run("tests", ["pytest", *selection, *options.pytest]) else 1


def run(name: str, command: list[str]) -> bool:
    """Run one step and say how it went."""
    started = time.perf_counter()
    print(f"== {name}: {' '.join(command)}", flush=True)
    # Tools lie beside the interpreter that runs this, whether or not its environment is activated.
    tool = Path(sys.executable).parent / command[0]
    code = subprocess.run([str(tool), *command[1:]], cwd=ROOT, check=False).returncode
    if code:
        print(f"== {name} failed after {time.perf_counter() - started:.0f} s", flush=True)
    return code == 0


def over_budget() -> Iterator[str]:
    """Yield one line per module, function or nesting that is over the size budget."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        where = path.relative_to(ROOT)
        if (lines := text.count("\n")) > MODULE_LINES:
            yield f"{where}: {lines} lines, at most {MODULE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, _FUNCTIONS):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{where}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_LINES}"
            if (depth := nesting(node.body)) > NESTING:
                yield f"{where}:{node.lineno} {node.name}: nested {depth} deep, at most {NESTING}"


def nesting(body: list[ast.stmt]) -> int:
    """Depth of nested blocks. An ``elif`` is no deeper than its ``if``; inner functions count apart."""
    deepest = 0
    for node in body:
        if not isinstance(node, _BLOCKS):
            continue
        for inner in inner_bodies(node):
            chained = isinstance(node, ast.If) and inner is node.orelse and is_elif(inner)
            deepest = max(deepest, nesting(inner) if chained else 1 + nesting(inner))
    return deepest


def is_elif(body: list[ast.stmt]) -> bool:
    return len(body) == 1 and isinstance(body[0], ast.If)


def inner_bodies(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        if found := getattr(node, name, None):
            yield found
    for name in ("handlers", "cases"):
        for part in getattr(node, name, []):
            yield part.body


if __name__ == "__main__":
    sys.exit(main())
