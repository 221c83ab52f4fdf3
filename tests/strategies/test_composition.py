"""What composes with secure aggregation, and that all which does not is told at once."""

from __future__ import annotations

from typing import Any

import pytest

from chexfound import recipe as recipes
from chexfound.errors import ConfigError
from chexfound.schema import Recipe
from strategies import composition

LOCAL = {"train.optimizer_state": "local", "adapt.optimizer_state": "local"}


def recipe(**values: Any) -> Recipe:
    return recipes.load(
        "demo", {"aggregation": "secagg", **LOCAL, **{k.replace("__", "."): v for k, v in values.items()}}
    )


@pytest.mark.parametrize("n_sites", [3, 4, 31, None])
def test_what_composes(n_sites: int | None) -> None:
    composition.check(recipe(), n_sites)
    composition.check(recipe(secagg__ring=16), n_sites)
    composition.check(recipes.load("demo"), 2)  # in the clear anything goes


@pytest.mark.parametrize(
    ("values", "n_sites", "said"),
    [
        ({"train__optimizer_state": "average"}, None, "train.optimizer_state"),
        ({"adapt__optimizer_state": "average"}, None, "adapt.optimizer_state"),
        ({}, 2, "3 to 128 sites; this federation has 2"),
        ({}, 129, "3 to 128 sites; this federation has 129"),
        ({"secagg__ring": 16}, 32, "secagg.ring"),
        ({"secagg__colluders": 2}, 3, "cannot hold against c = 2 colluders"),
    ],
)
def test_what_does_not(values: dict[str, Any], n_sites: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composition.check(recipe(**values), n_sites)


def test_only_what_a_phase_uses_counts() -> None:
    composition.check(recipe(phases=["pretrain"], adapt__optimizer_state="average"), 3)


def test_all_at_once() -> None:
    with pytest.raises(ConfigError, match="(?s)3 problems.*colluders.*train.optimizer_state.*adapt.optimizer_state"):
        composition.check(
            recipe(train__optimizer_state="average", adapt__optimizer_state="average", secagg__colluders=2), 3
        )
