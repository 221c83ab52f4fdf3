"""CITATION.cff is what Citation File Format 1.2.0 asks for, and of this release."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import chexfound

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def citation() -> Any:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_it_is_of_this_release(citation: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == chexfound.__version__ == project["version"]
    assert citation["license"] == project["license"]


def test_it_has_what_the_format_asks_for(citation: Any) -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all({"name"} <= set(one) or {"family-names", "given-names"} <= set(one) for one in work["authors"])


def test_the_paper_is_referred_to(citation: Any) -> None:
    (paper,) = citation["references"]
    assert paper["type"] == "article"
    assert "2502.05142" in paper["url"]
