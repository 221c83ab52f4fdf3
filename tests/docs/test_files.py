"""docs/files.md has every format and every file's name that the code has, with its number."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
PACKAGES = ("chexfound", "strategies", "server", "client", "sim")
VERSION = re.compile(r"(?:^|_)(?:SCHEMA|FORMAT|VERSION|KEYED)$")
ENDINGS = "json jsonl yaml toml npy npz safetensors sqlite key crt pub secret lock log html bin"
FILE = re.compile(rf"\.?[\w-]+\.(?:{'|'.join(ENDINGS.split())})$")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if "_app" not in path.parts:
                yield name, ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def modules() -> list[tuple[str, ast.Module]]:
    return list(trees())


def test_every_version_is_on_the_page(modules: list[tuple[str, ast.Module]]) -> None:
    found = {}
    for name, tree in modules:
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            value = node.value if isinstance(node, ast.Assign) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, int):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                found |= {f"{name}:{one}": value.value for one in names if VERSION.search(one)}
    told = {constant: int(number) for constant, number in re.findall(r"`([\w.]+:[A-Z_]+)` (\d+)", PAGE)}
    assert len(found) > 15
    assert told == found, "docs/files.md and the code have other formats, or other numbers of them"


def test_every_file_that_is_named_in_code_is_on_the_page(modules: list[tuple[str, ast.Module]]) -> None:
    """Names that stand right of a slash, or as the argument of `path(…)`: files in a folder of ours."""
    found = {}
    for name, tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                text = node.right
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "path":
                text = node.args[0] if node.args else None
            else:
                continue
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and FILE.match(text.value):
                found[text.value] = name
    assert len(found) > 40
    lacking = {file: module for file, module in found.items() if file not in PAGE}
    assert not lacking, "in the code, and not in docs/files.md"


def test_every_module_on_the_page_is_there() -> None:
    named = set(re.findall(r"`((?:chexfound|strategies|server|client|sim|benchmarks)/[\w/]+)`", PAGE))
    assert len(named) > 50
    assert not {name for name in named if not (ROOT / f"{name}.py").exists() and not (ROOT / name).is_dir()}
