"""docs/threat-model.md: each promise names its test, each test named is there, and each attack is in the list."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
ADVERSARIES = ("coordinator", "site", "stranger", "local_process", "other_account", "canaries", "gate")


def promises() -> list[tuple[str, str]]:
    """Of each table of promises: what is promised, and the cell that names its tests."""
    found, of_promises = [], False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            of_promises = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "promise":
            of_promises = True
        elif of_promises and not set(cells[0]) <= set("-: "):
            found.append((cells[0], cells[-1]))
    return found


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_promises() -> None:
    assert len(promises()) >= 20


@pytest.mark.parametrize(("promise", "tests"), promises())
def test_a_promise_names_its_test(promise: str, tests: str) -> None:
    named = NAMED.findall(tests)
    assert named, f"{promise}: names no test"
    for file, function in named:
        assert (ROOT / file).is_file(), f"{promise}: there is no {file}"
        assert not function or function in functions(ROOT / file), f"{promise}: {file} has no {function}"


def test_each_test_that_the_page_names_is_there() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    there = set().union(*map(functions, files))
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= there


def test_each_attack_is_in_the_page() -> None:
    named = {file for file, _ in NAMED.findall(PAGE)}
    for path in sorted((ROOT / "tests" / "hostile").glob("test_*.py")):
        assert f"tests/hostile/{path.name}" in named, f"{path.name} is an attack that the page does not tell"
        assert path.stem.removeprefix("test_").startswith(ADVERSARIES), f"{path.name}: whose attack is it?"
