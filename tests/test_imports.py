"""Imports point one way, and what a command needs to say its help is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY = {
    "chexfound": {"chexfound"},
    "strategies": {"chexfound", "strategies"},
    "server": {"chexfound", "strategies", "server"},
    "client": {"chexfound", "client"},
    "sim": {"chexfound", "strategies", "server", "client", "sim"},
}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "cv2",
    "matplotlib",
    "sklearn",
    "scipy",
    "pydicom",
    "flwr",
    "tensorboard",
    "rich",
    "numpy",
    "pydantic",
}
LINE = "import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"

HELP = """
import sys, {module} as cli
try:
    cli.main(['--help'])
except SystemExit as end:
    assert not end.code
print('modules:', *sorted(sys.modules))
"""

COMMAND = """
import sys
from chexfound import _launch
sys.argv = {arguments}
try:
    _launch.chexfound()
except SystemExit as end:
    assert not end.code
print('modules:', *sorted(sys.modules))
"""


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(str(node.module))
    return names


FILES = [
    (package, file) for package in MAY for file in sorted((ROOT / package).rglob("*.py")) if "_app" not in file.parts
]


def test_all_packages_are_looked_at() -> None:
    assert {package for package, _ in FILES} == set(MAY)
    assert any(file.name == "envelopes.py" for _, file in FILES)


@pytest.mark.parametrize(("package", "file"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_one_way(package: str, file: Path) -> None:
    tops = {name.partition(".")[0] for name in imported(file)}
    assert tops & set(MAY) <= MAY[package]
    assert "tests" not in tops
    if package == "chexfound" and "wire" not in file.parts:
        assert "flwr" not in tops


def test_entry_packages_are_empty() -> None:
    """`flwr run` executes them."""
    for package in ("strategies", "server", "client", "sim"):
        assert not (ROOT / package / "__init__.py").read_text().strip()


@pytest.mark.parametrize(
    "module",
    [
        "chexfound",
        "chexfound.commands.main",
        "sim.cli",
        "client.cli",
        "server.cli",
        "chexfound._launch",
        "sim.pretrain",
    ],
)
def test_a_command_line_is_light(module: str) -> None:
    if not (ROOT / Path(*module.split("."))).with_suffix(".py").exists() and not (ROOT / module).is_dir():
        pytest.skip(f"there is no {module} yet")
    ran = subprocess.run(
        [sys.executable, "-c", LINE.format(module=module)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(ran.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_pretrain_is_offered_and_taught_lightly(arguments: list[str]) -> None:
    """By the script, which puts together what may not import each other."""
    code = COMMAND.format(arguments=["chexfound", *arguments])
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shown, _, modules = ran.stdout.partition("modules:")
    assert "pretrain" in shown
    assert ("--log-every" in shown) == (arguments[0] == "pretrain")
    assert not HEAVY & {name.partition(".")[0] for name in modules.split()}


@pytest.mark.parametrize("module", ["chexfound.commands.main", "sim.cli", "server.cli"])
def test_help_is_light(module: str) -> None:
    """Not timed: a busy machine would fail it.  What takes the time is not imported."""
    code = HELP.format(module=module)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shown, _, modules = ran.stdout.partition("modules:")
    assert "usage:" in shown
    assert not HEAVY & {name.partition(".")[0] for name in modules.split()}


@pytest.mark.parametrize("module", ["client.app", "server.app", "sim.arms.plan", "sim.lone_store"])
def test_whoever_trains_starts_without_timm(module: str) -> None:
    """It takes as long to import as torch, and every worker would do so for two small layers (model/vit.py)."""
    line = LINE.format(module=module)
    ran = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" in ran.stdout.split()
    assert not {"timm", "torchvision"} & set(ran.stdout.split())
