"""Batches that several sites share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import BatchSizes, dealt, fitted

STAGE = {"rounds": 1, "global_crops_size": 128, "local_crops_size": 48}
sizes = st.integers(1, 5000)


@given(train=sizes, adapt=sizes, later=sizes, n=st.integers(1, 128))
def test_the_nearest_batch_that_divides_is_chosen(train: int, adapt: int, later: int, n: int) -> None:
    changes: dict[str, Any] = {"train.pooled_batch_size": train, "adapt.pooled_batch_size": adapt}
    recipe = recipes.load("demo", changes | {"curriculum": [{**STAGE, "pooled_batch_size": later}]})
    chosen, told = fitted(recipe, n)
    shares = BatchSizes.of(chosen, [1] * n)
    for asked, dealt_out in ((train, shares.pretrain[0]), (later, shares.pretrain[1]), (adapt, shares.adapt)):
        (share,) = set(dealt_out)
        assert share >= 1
        assert all(abs(share * n - asked) <= abs(other * n - asked) for other in (share - 1, share + 1) if other)
    assert len(told) == sum(asked % n > 0 for asked in (train, adapt, later))
    if not told:
        assert chosen == recipe


def test_what_is_chosen_is_said() -> None:
    _, told = fitted(recipes.load("demo"), 3)
    assert told == [
        "train.pooled_batch_size is 33, not 32: 3 sites take 11 images each",
        "adapt.pooled_batch_size is 63, not 64: 3 sites take 21 images each",
    ]


def test_a_sites_own_batch_and_a_phase_that_is_left_out_stay() -> None:
    recipe = recipes.load("demo", {"train.pooled_batch_size": None, "train.batch_size": 5, "phases": ["pretrain"]})
    assert fitted(recipe, 3) == (recipe, [])


def test_a_batch_that_is_dealt_by_size_stays_as_it_is() -> None:
    recipe = recipes.load("demo", {"train.deal": "by_size", "adapt.pooled_batch_size": 66})
    assert fitted(recipe, 3) == (recipe, [])


@given(images=st.lists(st.integers(0, 10**6), min_size=1, max_size=40), more=st.integers(0, 300))
def test_a_batch_is_dealt_in_whole_numbers_that_sum_to_it(images: list[int], more: int) -> None:
    pooled = len(images) + more
    shares = dealt(pooled, images)
    assert sum(shares) == pooled
    assert min(shares) >= 1
    for mine, others in itertools.permutations(zip(images, shares, strict=True), 2):
        # No site has an image that another, by its size, has the better claim to (Webster's, beyond the first each).
        assert others[1] == 1 or mine[0] * (2 * others[1] - 1) <= others[0] * (2 * mine[1] + 1)


@given(n=st.integers(1, 128), more=st.integers(0, 300))
def test_sites_of_one_size_have_the_same_but_for_one_image(n: int, more: int) -> None:
    assert dealt(n + more, [7] * n) == tuple((n + more) // n + (site < (n + more) % n) for site in range(n))


def test_by_size_and_equally() -> None:
    changes = {"train.pooled_batch_size": 13, "train.deal": "by_size"}
    batches = BatchSizes.of(recipes.load("demo", changes), [500, 310, 100])
    assert batches.pretrain == ((7, 5, 1),)
    assert batches.adapt == (22, 21, 21)
    assert BatchSizes.pooled(recipes.load("demo", changes), 3).pretrain == ((13,),)


def test_a_site_s_own_batch_is_not_dealt() -> None:
    changes = {"train.batch_size": 7, "train.pooled_batch_size": None, "phases": ["pretrain"]}
    assert BatchSizes.of(recipes.load("demo", changes), [5, 900]).pretrain == ((7, 7),)


def test_more_sites_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 problems(?s:.)*train.pooled_batch_size: a pooled batch of 32 images"):
        BatchSizes.of(recipes.load("demo"), [9] * 65)


def test_a_recipe_under_masks_is_not_dealt_by_size() -> None:
    with pytest.raises(ConfigError, match="adapt.deal: under masks nobody knows"):
        recipes.load("demo", {"aggregation": "secagg", "adapt.deal": "by_size"})
