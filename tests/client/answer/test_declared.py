"""The tables of what leaves a site name what is declared, all of it, and nothing else."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.contract import limits
from chexfound.contract.detached import Envelope
from chexfound.contract.request import Reply
from client.answer import asked, declared
from client.answer.egress import Gate, _kind
from tests.client.answer.test_asked import requests

DOCS = Path(__file__).resolve().parents[3] / "docs"


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    text = (DOCS / page).read_text().partition(f"\n{section}\n")[2]
    lines = re.search(r"(?m)(?:^\|.*\n)+", text)
    assert lines is not None, f"{page}, {section}: no table"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.group().splitlines()[2:]]


def words(cell: str) -> list[str]:
    """What stands there as code; a file, or a key with a dot, is none of it."""
    return re.findall(r"`([a-z_]+)`", cell)


def fields(kind: Any) -> Iterator[str]:
    """The names of a declared type's fields, and of what is in them; those of a policy are told elsewhere."""
    if kind is limits.Limits:
        return
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield name
            yield from fields(hint)
    for inner in typing.get_args(kind):
        yield from fields(inner)


FIELDS = {words(row[0])[0]: row for row in rows("site.md", "### Field by field")}


def test_each_message_has_its_row() -> None:
    assert set(FIELDS) == set(declared.KINDS)


@pytest.mark.parametrize("phase", declared.KINDS)
def test_a_row_has_the_fields_that_are_declared(phase: str) -> None:
    assert set(words(FIELDS[phase][1])) == {name for kind in declared.KINDS[phase] for name in fields(kind)}


@pytest.mark.parametrize("phase", ["enrol", "pretrain", "features", "adapt", "evaluate"])
def test_a_row_has_the_tensors_that_leave(tiny_recipe: Any, phase: str) -> None:
    """Of a recipe in which everything is averaged that can be."""
    request = requests(tiny_recipe)[phase]
    gate = Gate(recipe=tiny_recipe, request=request, sent=asked.forms(Envelope(message=request)), site="north")
    leaving = gate._leaving(phase, Reply(values={"images": 30}))
    assert set(words(FIELDS[phase][2])) == {_kind(phase, name) for name in leaving}


def test_the_tensors_together_are_those_of_site_yaml() -> None:
    told = {word for phase in ("pretrain", "adapt") for word in words(FIELDS[phase][2])}
    assert told == set(typing.get_args(typing.get_args(limits.Tensors)[0]))


@pytest.mark.parametrize(("page", "section"), [("site.md", "## What leaves"), ("deployed.md", "## What leaves a site")])
def test_the_tables_in_words_have_the_same_phases(page: str, section: str) -> None:
    named = {word for row in rows(page, section) for word in words(row[0])}
    assert named <= set(declared.KINDS)
    assert {"pretrain", "features", "adapt", "evaluate"} <= named
