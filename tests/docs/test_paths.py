"""Files that the documentation names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
NAMED = re.compile(r"`([a-z_]+(?:/[a-zA-Z0-9_.-]+)+\.(?:py|md|yaml|svg))`")
BESIDE = ("", "chexfound", "docs")  # where a path may begin: this repository, the package, the pages
THEN = {"docs/decisions/NNNN-title.md", "client/weights.py"}  # a pattern, and a name that is told of as gone


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    named = set(NAMED.findall(page.read_text())) - THEN
    assert {name for name in named if not any((ROOT / base / name).exists() for base in BESIDE)} == set()


def test_paths_are_looked_for() -> None:
    assert sum(len(NAMED.findall(page.read_text())) for page in PAGES) > 100
