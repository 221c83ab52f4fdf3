"""What a site tells of few patients: nothing, and nothing that it could be taken from."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.contract import cells, request
from chexfound.contract.request import Request
from chexfound.data.store.split import Part
from chexfound.phases import enrol
from chexfound.phases.site_state import Site
from chexfound.recipe import load as recipes
from client.answer.declared import DeclaredResult

LEAST = 2
CELLS = tuple(itertools.product(("train", "val", "test"), (1, 0, -1)))  # a patient's part, and what his image shows


class Store:
    """Images of these patients, one each."""

    findings = ("Nodule",)

    def __init__(self, table: tuple[int, ...]) -> None:
        self.patients = [cell for cell, number in zip(CELLS, table, strict=True) for _ in range(number)]
        self.keys = [str(number) for number in range(len(self.patients))]

    def labels(self, ids: np.ndarray, findings: Any) -> np.ndarray:
        shown = np.array([label for _, label in self.patients], np.int8)[ids]
        result = np.full((len(ids), len(findings)), -1, np.int8)
        result[:, [name == "Nodule" for name in findings]] = shown[:, None]
        return result

    def digest(self) -> str:
        return ""


class Place(Site):
    """A site of such a store, whose patients are where the table says."""

    def split(self, recipe: Any, which: Part) -> np.ndarray:
        return np.array([i for i, (part, _) in enumerate(self.view.store.patients) if part == which], np.int64)


def place(table: tuple[int, ...], tmp: Any = None) -> Place:
    store = Store(table)
    view = SimpleNamespace(store=store, ids=np.arange(len(store.keys)), name="north")
    return Place(view=view, home=tmp, cells=LEAST, words=frozenset({"Nodule"}))  # type: ignore[arg-type]


def leaves(table: tuple[int, ...]) -> str:
    """All numbers that leave a site in a plain run: its enrolment, its part in adapt, and its rows of results."""
    here, recipe = place(table), recipes.load("demo")
    told = enrol.enrol(here, recipe, Request(phase="enrol")).values
    test = here.labels(here.split(recipe, "test"), ["Nodule"])
    train = here.training_labels(recipe, ["Nodule"])
    row = {"n": int((test >= 0).sum()), "positives": int((test == 1).sum())}  # all that a row stands on
    trained = int((train >= 0).sum())
    return repr([told, trained or cells.SUPPRESSED, row if row["n"] else cells.row(row)])


def tables(patients: int) -> list[tuple[int, ...]]:
    """Every way in which up to so many patients can be."""
    found = []
    for bars in itertools.combinations(range(patients + len(CELLS)), len(CELLS)):
        edges = (-1, *bars)
        found.append(tuple(right - left - 1 for left, right in itertools.pairwise(edges)))
    return found


@pytest.fixture(scope="module")
def by_what_leaves() -> dict[str, list[tuple[int, ...]]]:
    found = defaultdict(list)
    for table in tables(6):
        found[leaves(table)].append(table)
    return found


GROUPS: dict[str, tuple[int, ...]] = {
    **{f"{part}, with the finding": (CELLS.index((part, 1)),) for part in ("train", "test")},
    **{f"{part}, without it": (CELLS.index((part, 0)),) for part in ("train", "test")},
    **{part: tuple(i for i, (which, _) in enumerate(CELLS) if which == part) for part in ("train", "val", "test")},
}


@pytest.mark.parametrize("group", GROUPS)
def test_no_small_group_can_be_counted_from_what_leaves(by_what_leaves: Any, group: str) -> None:
    """Of each table of up to four patients some other fits what left it, with another number of them in the group.

    Where it is empty a table with as many as are still few fits, and the other way round: none and few are alike.
    """
    seen = 0
    for fitting in by_what_leaves.values():
        sizes = {sum(table[i] for i in GROUPS[group]) for table in fitting}
        small = [table for table in fitting if sum(table) <= 4 and sum(table[i] for i in GROUPS[group]) < LEAST]
        if small:
            seen += 1
            assert set(range(LEAST)) <= sizes, small[0]
    assert seen


def test_a_large_group_is_told(by_what_leaves: Any) -> None:
    """Else nothing would be."""
    table = tuple({("train", 1): 2, ("train", 0): 2, ("test", 1): 0}.get(cell, 0) for cell in CELLS)
    assert "{'positives': 2, 'negatives': 2}" in leaves(table)
    assert "'train': 4" in leaves(table)


def test_a_site_adds_nothing_of_few_to_a_sum() -> None:
    """Of its numbers under masks each is of enough patients, or 0."""
    for table in tables(4):
        values = enrol.counts(place(table), recipes.load("demo"), Request(phase="counts")).values
        numbers = [values[name] for name in request.COUNTS]
        numbers += [number for both in values["findings"].values() for number in both.values()]
        assert all(number == 0 or number >= LEAST for number in numbers), table


labels = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 0, -1])), max_size=12)


@given(labels, st.integers(0, 4))
def test_patients_are_counted_and_not_images(images: list[tuple[int, int]], least: int) -> None:
    """A patient counts once with the finding, and once without, however many images he has."""
    patients = [f"patient {number}" for number, _ in images]
    column = np.array([label for _, label in images], np.int8).reshape(-1, 1)
    positive = {number for number, label in images if label == 1}
    negative = {number for number, label in images if label == 0}
    assert bool(cells.large(column, patients, least)[0]) is (min(len(positive), len(negative)) >= least)
    assert cells.patients_with(column == 1, patients).tolist() == [len(positive)]


def test_a_row_of_few_says_whose_it_is_and_nothing_else() -> None:
    """Nor why it lacks a figure, which names how many images there are."""
    asked = {"tested_on": "north", "finding": "Nodule"}
    figures = dict.fromkeys(("n", "positives", "auroc", "auroc_ci", "auprc", "auprc_ci"), 3)
    row = cells.row({**asked, **figures, "reason": "no positive among the 3 held-out images"})
    assert row == {**asked, **dict.fromkeys(figures, "suppressed"), "reason": None}


def test_a_row_of_few_patients_has_nothing_of_its_result() -> None:
    """Whatever a row of results may hold: all but whose it is, and of which finding."""
    whose = {"arm", "trained_on", "tested_on", "finding"}
    result = {field.name: f"the {field.name}" for field in fields(DeclaredResult)}
    told = cells.row(result)
    assert told.keys() == result.keys()
    assert {name for name, value in told.items() if value == result[name]} == whose
    assert {told[name] for name in result.keys() - whose} == {cells.SUPPRESSED, None}


def test_the_word_is_no_number() -> None:
    assert cells.told(9, 9, 10) == cells.SUPPRESSED
    assert cells.told(0, 0, 10) == cells.SUPPRESSED
    assert cells.told(10, 10, 10) == 10
    assert cells.told(0, 0, 0) == 0
    assert cells.known(cells.SUPPRESSED) == 0
    assert cells.shown(cells.SUPPRESSED, 10) == "suppressed (fewer than 10 patients)"
    assert cells.shown(1234) == "1,234"
