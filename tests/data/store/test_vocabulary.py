"""Which names of findings may leave: those of the data sets that are named, and nothing that is like one."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.phantom.cases import FINDINGS
from chexfound.data.store import vocabulary
from chexfound.parsing.names import is_name


class Store:
    """As much of one as is asked."""

    findings = ("Nodule", "O'Brien, Pat", "Trap", "empty")

    def labels(self, ids: np.ndarray, findings: list[str]) -> np.ndarray:
        columns = {"Nodule": [1, 0, 1], "O'Brien, Pat": [1, -1, -1], "Trap": [0, 0, -1], "empty": [-1, -1, -1]}
        return np.array([columns[name] for name in findings], np.int8).T[ids]


def test_the_phantoms_and_the_spellings_of_data_sets() -> None:
    released = vocabulary.released()
    assert set(FINDINGS) <= released
    assert {"Pleural_Thickening", "Pleural Thickening", "pleural thickening", "No Finding", "No finding"} <= released
    assert {"Round(ed) Atelectasis", "E.Coli", "COVID-19", "NSG tube", "costophrenic angle blunting"} <= released


def test_the_names_of_the_tasks_and_of_the_pack(require: Callable[[str], Path]) -> None:
    """Each finding of the tasks that shared/ describes, and each that the real X-rays are labelled with."""
    shared = require("shared")
    for task in ("cxr-lt-2024", "cxr-lt-2024-task2", "cxr-lt-2024-task3", "nih-14", "chexpert-5"):
        listed = yaml.safe_load((shared / "tasks" / f"{task}.yaml").read_text())["findings"]
        names = [one if isinstance(one, str) else one["name"] for one in listed]
        assert names
        assert set(names) <= vocabulary.released(), task
    with open(shared / "data" / "cxr" / "manifest.csv", newline="") as file:
        used = {name for row in csv.DictReader(file) for name in row["findings"].split("|")} - {""}
    assert used <= vocabulary.released()
    header = (shared / "data" / "layouts" / "chexpert" / "train.header.csv").read_text().strip().split(",")
    assert set(header[5:]) <= vocabulary.released()


def test_each_is_a_name_that_travels() -> None:
    assert all(map(is_name, vocabulary.released()))
    assert 1000 < len(vocabulary.released()) < 4096


@pytest.mark.parametrize("name", ["MUELLER Hans 12.3.1954 HIV", "nodule ", "NODULE", "Nodule Hans", "", "Nodule\n"])
def test_only_what_stands_there_letter_by_letter(name: str) -> None:
    assert name not in vocabulary.released()
    assert name not in vocabulary.permitted()


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=60))
def test_an_operators_own_name_leaves_as_it_was_written(name: str) -> None:
    assert vocabulary.permitted([name]) - vocabulary.released() <= {name}


def test_what_stays_is_counted_and_the_line_lets_it_out() -> None:
    """The line, written into site.yaml, leaves nothing behind."""
    store, ids = Store(), np.arange(3)
    found = vocabulary.withheld(store, ids, vocabulary.permitted())
    assert found == {"O'Brien, Pat": 1, "Trap": 2}
    names, line = vocabulary.said(found)
    assert "Trap (2 images)" in names
    own = yaml.safe_load(line.partition("site.yaml: ")[2])["findings"]
    assert own == ["O'Brien, Pat", "Trap"]
    assert vocabulary.withheld(store, ids, vocabulary.permitted(own)) == {}


def test_a_column_of_free_text_does_not_fill_the_screen() -> None:
    names, line = vocabulary.said({f"text {number:03d}": 1 for number in range(500)})
    assert "and 480 more" in names
    assert line.endswith("…]")
