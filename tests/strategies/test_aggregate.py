"""The fold: the float64 weighted mean, whatever comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ProtocolError
from strategies.aggregate import RunningMean

F, D = 3, 2

# Multiples of 2⁻¹⁶ below 4: with weights below 2¹², sums of eight are exact in float64.
grid = st.integers(-(2**18), 2**18).map(lambda n: n / 2**16)
anything = st.floats(-(2.0**99), 2.0**99, width=32)
weights = st.integers(0, 2**12)


def updates(value: st.SearchStrategy[float], min_size: int = 1) -> st.SearchStrategy[list[Any]]:
    """(tensors, weight, row weights) of several sites; `rows` has one row a finding."""
    one = st.tuples(
        st.lists(value, min_size=D, max_size=D),
        st.lists(st.lists(value, min_size=D, max_size=D), min_size=F, max_size=F),
        weights,
        st.lists(weights, min_size=F, max_size=F),
    )
    return st.lists(
        one.map(lambda v: ({"plain": torch.tensor(v[0]), "rows": torch.tensor(v[1])}, v[2], v[3])),
        min_size=min_size,
        max_size=8,
    )


def previous() -> dict[str, torch.Tensor]:
    return {"plain": torch.full((D,), 7.0), "rows": torch.full((F, D), 9.0)}


def folded(sites: list[Any]) -> dict[str, torch.Tensor]:
    fold = RunningMean(previous(), ["rows"])
    for site in sites:
        fold.add(*site)
    return fold.result()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@given(updates(grid), st.randoms(use_true_random=False))
def test_order_does_not_matter_bit_for_bit(sites: list[Any], random: Any) -> None:
    shuffled = list(sites)
    random.shuffle(shuffled)
    assert bits(folded(sites)) == bits(folded(shuffled))


@given(updates(anything))
def test_is_the_float64_weighted_mean(sites: list[Any]) -> None:
    result = folded(sites)
    for name in ("plain", "rows"):
        stack = np.stack([site[0][name].numpy().astype(np.float64) for site in sites])
        by = np.array([site[1] if name == "plain" else site[2] for site in sites], np.float64)
        by = np.broadcast_to(by.reshape(len(sites), -1, *[1] * (stack.ndim - 2)), stack.shape)
        total = by.sum(0)
        mean = np.where(total > 0, (by * stack).sum(0) / np.where(total > 0, total, 1), previous()[name].numpy())
        # Beyond the rounding to float32, only the order of a float64 sum, which is small beside its largest term.
        slack = 1e-12 * np.abs(stack).max(0)
        np.testing.assert_array_less(np.abs(result[name].numpy() - mean), np.abs(mean) * 2**-24 + slack + 1e-45)


@given(updates(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_a_lone_update_is_copied_bit_for_bit(sites: list[Any]) -> None:
    tensors, weight, rows = sites[0]
    result = folded([(tensors, weight + 1, [row + 1 for row in rows])])
    assert bits(result) == bits(tensors)


@given(updates(grid, min_size=2))
def test_a_site_without_labels_does_not_dilute(sites: list[Any]) -> None:
    """Its rows are left out as if it had not come; a row that nobody labels stays."""
    silent = [(tensors, weight, [0, *rows[1:]]) for tensors, weight, rows in sites]
    assert torch.equal(folded(silent)["rows"][0], previous()["rows"][0])
    tensors, weight, rows = sites[0]
    speaking = [(tensors, weight, [5, *rows[1:]]), *silent[1:]]
    assert torch.equal(folded(speaking)["rows"][0], tensors["rows"][0])


def test_nothing_added_leaves_the_model() -> None:
    before = previous()
    result = RunningMean(before, ["rows"]).result()
    assert bits(result) == bits(before)
    assert result["plain"] is not before["plain"]


def good() -> dict[str, torch.Tensor]:
    return {"plain": torch.ones(D), "rows": torch.ones(F, D)}


NAN, INF = float("nan"), float("inf")
HOSTILE = [
    pytest.param({"plain": torch.ones(D)}, 1, [1] * F, "other tensors", id="a tensor is missing"),
    pytest.param({**good(), "more": torch.ones(1)}, 1, [1] * F, "other tensors", id="one too many"),
    pytest.param({**good(), "plain": torch.ones(D + 1)}, 1, [1] * F, "another shape", id="shape"),
    pytest.param({**good(), "plain": torch.ones(D).double()}, 1, [1] * F, "another shape or dtype", id="dtype"),
    pytest.param({**good(), "rows": torch.ones(F + 1, D)}, 1, [1] * F, "another shape", id="rows"),
    pytest.param(good(), 1, [1] * (F + 1), "its weights 4 rows", id="too many row weights"),
    pytest.param(good(), 1, [1, -1, 1], "weight must be", id="negative row weight"),
    pytest.param(good(), 1, [1, NAN, 1], "weight must be", id="NaN row weight"),
    pytest.param(good(), -1, [1] * F, "weight must be", id="negative weight"),
    pytest.param(good(), NAN, [1] * F, "weight must be", id="NaN weight"),
    pytest.param(good(), INF, [1] * F, "weight must be", id="infinite weight"),
    pytest.param({**good(), "plain": torch.tensor([1.0, NAN])}, 1, [1] * F, "not a finite number", id="NaN"),
    pytest.param({**good(), "rows": torch.full((F, D), INF)}, 1, [1] * F, "not a finite number", id="infinity"),
    pytest.param({**good(), "rows": torch.tensor(1.0)}, 1, [1] * F, "shape", id="a scalar for rows"),
]


@pytest.mark.parametrize(("update", "weight", "rows", "message"), HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_a_hostile_update_is_refused_and_nothing_added(
    update: dict[str, torch.Tensor], weight: float, rows: list[float], message: str, first: bool
) -> None:
    fold = RunningMean(good(), ["rows"])
    if not first:
        fold.add({name: 3 * tensor for name, tensor in good().items()}, 2, [2] * F)
    with pytest.raises(ProtocolError, match=message):
        fold.add(update, weight, rows)
    assert fold.count == (0 if first else 1)
    expected = good() if first else {name: 3 * tensor for name, tensor in good().items()}
    assert bits(fold.result()) == bits(expected)


def test_a_mean_that_is_not_finite_is_refused() -> None:
    fold = RunningMean({"plain": torch.ones(2, dtype=torch.float64)})
    fold.add({"plain": torch.full((2,), 1e308, dtype=torch.float64)}, 100)
    with pytest.raises(ProtocolError, match="the mean of the updates' 'plain' is not finite"):
        fold.result()
