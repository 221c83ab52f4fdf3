"""Batches that several sites share."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from chexfound.recipe import load as recipes
from chexfound.recipe.batch_sizes import BatchSizes, fitted

STAGE = {"rounds": 1, "global_crops_size": 128, "local_crops_size": 48}
sizes = st.integers(1, 5000)


@given(train=sizes, adapt=sizes, later=sizes, n=st.integers(1, 128))
def test_the_nearest_batch_that_divides_is_chosen(train: int, adapt: int, later: int, n: int) -> None:
    changes: dict[str, Any] = {"train.pooled_batch_size": train, "adapt.pooled_batch_size": adapt}
    recipe = recipes.load("demo", changes | {"curriculum": [{**STAGE, "pooled_batch_size": later}]})
    chosen, told = fitted(recipe, n)
    shares = BatchSizes.of(chosen, n)  # which raises for one that does not divide
    for asked, share in ((train, shares.pretrain[0]), (later, shares.pretrain[1]), (adapt, shares.adapt)):
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


def test_a_batch_that_cannot_be_shared_is_refused_where_nobody_chose_another() -> None:
    with pytest.raises(ConfigError, match="train.pooled_batch_size 32 cannot be divided equally among 3 sites"):
        BatchSizes.of(recipes.load("demo"), 3)
