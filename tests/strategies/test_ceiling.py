"""No site is more than half of a mean of several, and where none would be nothing changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chexfound.contract.request import Reply
from strategies.ceiling import Ceiling, cut, most, outsized, share
from strategies.fedavg import FedAvg

weights = st.lists(st.integers(0, 10**9), min_size=1, max_size=12)


@given(weights)
def test_no_site_is_above_its_share_of_what_counts(given: list[int]) -> None:
    limit = most(given)
    there = [cut(weight, limit) for weight in given if weight]
    if limit is not None:
        assert max(there) <= share(len(there)) * sum(there) + 1


@given(weights)
def test_only_who_is_above_is_cut(given: list[int]) -> None:
    there = [weight for weight in given if weight]
    above = {weight for weight in there if len(there) > 2 and weight > share(len(there)) * sum(there)}
    assert {weight for weight in given if cut(weight, most(given)) != weight} == above
    assert len(above) <= 1


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ([5], None),
        ([5, 10**9], None),  # of two each may be all
        ([0, 5, 10**9], None),  # that has nothing is no third
        ([5, 7, 10**9], 24),  # two thirds
        ([5, 7, 8, 10**9], 20),  # a half
        ([5, 5, 5, 5], 15),
    ],
)
def test_by_hand(given: list[int], limit: int | None) -> None:
    assert most(given) == limit


def test_each_finding_has_a_ceiling_of_its_own() -> None:
    images = {"alpha": 10, "beta": 10, "delta": 10, "gamma": 10}
    made = Ceiling.of(images, {"alpha": [90, 90, 5], "beta": [0, 10, 5], "delta": [0, 10, 5], "gamma": [0, 10, 5]})
    assert made.images == 30
    assert made.labelled == (None, 30, 15)  # what alpha alone labels is its own
    assert made.capped == {"alpha": 0.75}
    made = Ceiling.of(images, {"alpha": [90, 0], "beta": [10, 0], "delta": [10, 40], "gamma": [10, 0]})
    assert made.capped == {"alpha": 0.75}
    made = Ceiling.of(images, {"alpha": [90, 40], "beta": [10, 10], "delta": [10, 10], "gamma": [10, 10]})
    assert made.capped == {"alpha": 0.75}  # the largest share, in whichever column


def reply(value: float, images: int, labelled: Sequence[int] = ()) -> Reply:
    tensors = {"weight": torch.full((2,), value), "rows": torch.full((1, 2), value)}
    return Reply(tensors=tensors, values={"images": images, "labelled": list(labelled)})


@pytest.mark.parametrize("claimed", [10**9, 31])
def test_a_mean_goes_half_of_the_way_of_who_claims_more_than_all_others(claimed: int) -> None:
    sent = {"weight": torch.zeros(2), "rows": torch.zeros(1, 2)}
    for phase, rows in (("pretrain", ()), ("adapt", ("rows",))):
        counts = {"alpha": claimed, "beta": 10, "delta": 10, "gamma": 10}
        ceiling = Ceiling.of(counts, {name: [number] for name, number in counts.items()} if rows else None)
        fold = FedAvg(phase, sent, len(rows), rows, ceiling=ceiling)
        for name, number in counts.items():
            fold.add(reply(1.0 if name == "alpha" else 0.0, number, [number]))
        assert all(torch.equal(tensor, torch.full_like(tensor, 0.5)) for tensor in fold.result().values()), phase


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(1, 50)), min_size=4, max_size=6))
def test_below_the_ceiling_the_mean_has_the_same_bits(sites: list[tuple[float, int]]) -> None:
    counts = [number for _, number in sites]
    if 2 * max(counts) > sum(counts):
        return
    sent = {"weight": torch.zeros(2), "rows": torch.zeros(1, 2)}
    ceiling = Ceiling.of({str(place): number for place, number in enumerate(counts)})
    plain, held = FedAvg("pretrain", sent), FedAvg("pretrain", sent, ceiling=ceiling)
    for value, number in sites:
        plain.add(reply(value, number))
        held.add(reply(value, number))
    before, after = plain.result(), held.result()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ten_times_the_median_is_told() -> None:
    assert outsized({"a": 10, "b": 20, "c": 199}) == {}
    assert outsized({"a": 10, "b": 20, "c": 200}) == {"c": 10.0}
    assert outsized({"a": 1000}) == {}
