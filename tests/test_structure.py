"""The shape of the five packages: imports point down, rooms are small, names have one meaning.

What is measured is what is written: imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import statistics
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("chexfound", "strategies", "server", "client", "sim")
MODULES_MAX = 14  # of a folder
TWICE_MAX = 10  # names of modules that stand twice
TWICE = {
    "app",
    "cli",
    "display",
    "flwr_private",
    "keys",
    "ledger",
    "load",
    "options",
    "pretrain",
    "sums",
}  # docs/decisions/0015
LINES_P95 = 400
FUNCTION_MEDIAN, FUNCTION_P95 = 8, 29


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            if "_app" not in file.parts:
                parts = file.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = file, ast.parse(file.read_text())
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports, anywhere in it."""
    there, result = modules(), defaultdict(set)
    for name, (_, tree) in there.items():
        for node in ast.walk(tree):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                of = str(node.module)
                wanted = [f"{of}.{alias.name}" if f"{of}.{alias.name}" in there else of for alias in node.names]
            result[name] |= {one for one in wanted if one in there and one != name}
    return result


def reached(start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for one in imports()[todo.pop()] - found:
            found.add(one)
            todo.append(one)
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert {name for name in modules() if name in reached(name)} == set()


def test_a_circle_would_be_found() -> None:
    """The walk sees through more than one step, and through imports inside functions."""
    assert {"server.rounds.loop", "chexfound.model.checkpoint"} <= reached("server.app")
    assert "server.rounds.health" in imports()["sim.engine.listeners"]  # inside a function


def test_a_folder_has_few_modules() -> None:
    folders = Counter(file.parent for file, _ in modules().values() if file.name != "__init__.py")
    assert {str(folder): number for folder, number in folders.items() if number > MODULES_MAX} == {}


def test_a_modules_name_stands_twice_only_where_it_is_listed() -> None:
    stems = Counter(file.stem for file, _ in modules().values() if not file.name.startswith("__"))
    twice = {name for name, number in stems.items() if number > 1}
    assert twice <= TWICE
    assert len(TWICE) <= TWICE_MAX
    text = (ROOT / "docs" / "decisions" / "0015-rooms.md").read_text()
    assert all(f"`{name}`" in text for name in TWICE)


def test_a_class_has_one_meaning() -> None:
    classes = defaultdict(list)
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(name)
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


def test_files_and_functions_are_short() -> None:
    lines = sorted(len(file.read_text().splitlines()) for file, _ in modules().values() if file.name != "__init__.py")
    assert lines[int(len(lines) * 0.95)] <= LINES_P95
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = sorted(
        int(node.end_lineno or 0) - node.lineno + 1
        for _, tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    )
    assert statistics.median(functions) <= FUNCTION_MEDIAN
    assert functions[int(len(functions) * 0.95)] <= FUNCTION_P95
