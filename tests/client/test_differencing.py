"""A second sum on the same weights over the same sites, of which the two would tell more than the one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chexfound.recipe.curriculum import changed
from tests.client.test_hostile_coordinator import pretraining
from tests.secagg.federation import NAMES, Federation, Try

pytest_plugins = ("tests.secagg.fixtures",)


def unmasked(one: Try) -> list[Any]:
    """What each site gives in the last stage."""
    one.until("unmask")
    return [one.ask("unmask", name) for name in NAMES]


def with_settings(one: Try, **changes: Any) -> Try:
    one.settings = replace(one.settings, **changes)
    return one


@pytest.mark.parametrize("change", ["images", "ranges", "steps", "recipe"])
def test_other_numbers_on_the_same_weights_are_another_sum(change: str, fed: Federation) -> None:
    """k S(k) - (k - 1) S(k - 1), for a weight capped at k images, is the part of the sites that have as many."""
    pretraining(fed).finish()
    second = pretraining(fed, 2)
    if change == "images":
        with_settings(second, images=second.settings.images - 1)
    elif change == "ranges":
        with_settings(second, ranges={name: value / 2 for name, value in second.settings.ranges.items()})
    elif change == "steps":
        second.request = replace(second.request, batch_size=second.request.batch_size + 1)
    else:
        second.recipe = changed(fed.recipe, split=changed(fed.recipe.split, train=0.5))
    assert unmasked(second) == ["secagg.differencing"] * len(NAMES)
    assert pretraining(fed, 3).finish()["images"]  # the sum that there was may be had again


def test_counts_by_another_seed_are_no_second_sum(fed: Federation) -> None:
    """The split decides which sites have a finding to train on, and so which are left out."""
    every = ("Bar", "Blob", "Rare")
    other = changed(fed.recipe, seed=1)
    tries = [fed.attempt(findings=every), fed.attempt(number=2, findings=every, recipe=other), fed.attempt(number=3)]
    assert [int(one.finish()["images"]) for one in tries] == [96] * 3
