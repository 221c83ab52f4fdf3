"""An update that is too long counts up to a bound, and an honest one as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chexfound.contract.request import Reply
from strategies.fedavg import FedAvg
from strategies.robust import bound, clipped, norm

MOMENT = "optimizer.weight.exp_avg"


def sent() -> dict[str, Tensor]:
    return {"weight": torch.ones(4), MOMENT: torch.zeros(4)}


def moved(by: float) -> dict[str, Tensor]:
    return {"weight": torch.ones(4) + by, MOMENT: torch.full((4,), by)}


def test_a_norm_is_of_the_weights_alone() -> None:
    assert norm(moved(3.0), sent()) == pytest.approx(6.0)


@given(st.floats(0.015625, 128, width=32), st.floats(0.001, 0.999))
def test_a_clipped_update_has_the_bound_s_norm_and_the_same_direction(by: float, part: float) -> None:
    own = norm(moved(by), sent())
    found = clipped(moved(by), sent(), own, part * own)
    assert norm(found, sent()) == pytest.approx(part * own, rel=1e-4, abs=1e-6)
    assert torch.allclose(found["weight"] - 1, torch.full((4,), part * by), rtol=1e-3, atol=1e-5)
    assert torch.equal(found[MOMENT], moved(by)[MOMENT])


def test_the_bound_is_by_the_median_of_the_round_before() -> None:
    assert bound(2.0, [1.0, 3.0, 900.0]) == 6.0
    assert bound(2.0, []) is None  # a phase's first round
    assert bound(2.0, [0.0, 0.0]) is None  # nobody moved
    assert bound(None, [1.0]) is None


@pytest.mark.parametrize(("most", "expected"), [(None, 252.0), (4.0, 1 + 5 / 3), (6.0, 3.0)])
def test_a_boosted_site_moves_the_mean_by_the_bound(most: float | None, expected: float) -> None:
    """Three sites whose weights go by 1, 2 and 750, so with norms of 2, 4 and 1500."""
    fold = FedAvg("pretrain", sent(), bound=most)
    for by in (1.0, 2.0, 750.0):
        fold.add(Reply(tensors=moved(by), values={"images": 10}))
    assert fold.result()["weight"][0].item() == pytest.approx(expected, rel=1e-5)
