"""Which weight a reply has, and which replies have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chexfound.contract.request import Reply
from chexfound.errors import ProtocolError
from strategies.fedavg import FedAvg


def reply(images: Any, value: float, labelled: Any = None) -> Reply:
    values = {"images": images} | ({} if labelled is None else {"labelled": labelled})
    return Reply(tensors={"trunk": torch.full((2,), value), "rows": torch.full((2, 3), value)}, values=values)


BEFORE = {"trunk": torch.zeros(2), "rows": torch.zeros(2, 3)}


def test_pretraining_weighs_by_images() -> None:
    strategy = FedAvg("pretrain", BEFORE)
    strategy.add(reply(30, 1.0))
    strategy.add(reply(10, 5.0))
    result = strategy.result()
    assert result["trunk"].tolist() == [2.0, 2.0]
    assert result["rows"].unique().tolist() == [2.0]


def test_rows_weigh_by_their_labelled_images() -> None:
    strategy = FedAvg("adapt", BEFORE, 2, ["rows"])
    strategy.add(reply(30, 1.0, [30, 0]))
    strategy.add(reply(10, 5.0, [10, 0]))
    strategy.add(Reply(values={"images": 0, "labelled": [0, 0]}))
    result = strategy.result()
    assert result["rows"].tolist() == [[2.0] * 3, [0.0] * 3]
    assert result["trunk"].tolist() == [2.0, 2.0]


def test_a_site_that_trained_nothing_sends_no_tensors() -> None:
    strategy = FedAvg("adapt", BEFORE, 2, ["rows"])
    strategy.add(Reply(values={"images": 0, "labelled": [0, 0]}))
    strategy.add(reply(10, 5.0, [10, 7]))
    assert strategy.result()["rows"].unique().tolist() == [5.0]


@pytest.mark.parametrize("count", [None, -1, True, 1.5, "3", [3], 2**40, 10**400, float("nan")])
def test_what_is_not_a_count_is_refused(count: Any) -> None:
    strategy = FedAvg("adapt", BEFORE, 2, ["rows"])
    strategy.add(reply(10, 5.0, [10, 7]))
    for hostile in (reply(count, 1.0, [1, 1]), reply(1, 1.0, [1, count]), reply(1, 1.0, count)):
        with pytest.raises(ProtocolError, match="count"):
            strategy.add(hostile)
    assert strategy.result()["rows"].unique().tolist() == [5.0]


def test_labelled_must_be_one_count_a_finding() -> None:
    for labelled in ([1], [1, 1, 1], {"0": 1}, "11"):
        with pytest.raises(ProtocolError, match="must be 2 counts"):
            FedAvg("adapt", BEFORE, 2, ["rows"]).add(reply(1, 1.0, labelled))


@pytest.mark.parametrize("counts", [{"images": 0}, {"images": 5}], ids=str)
def test_a_site_without_a_label_adds_nothing(counts: dict[str, int]) -> None:
    tensors = {} if counts["images"] else reply(0, 1.0).tensors
    with pytest.raises(ProtocolError, match="without a labelled image"):
        FedAvg("adapt", BEFORE, 2, ["rows"]).add(Reply(tensors=tensors, values={**counts, "labelled": [0, 0]}))


@pytest.mark.parametrize("phase", ["pretrain", "adapt"])
def test_an_empty_reply_has_no_weight(phase: str) -> None:
    """First of all, it once took part with its images and nothing else: the others' mean was scaled down."""
    strategy = FedAvg(phase, BEFORE, 2, ["rows"])
    with pytest.raises(ProtocolError, match="other tensors than were sent: .'rows', 'trunk'."):
        strategy.add(Reply(values={"images": 1000, "labelled": [1000, 1000]}))
    strategy.add(reply(1000, 1.0, [1000, 1000]))
    assert strategy.result()["trunk"].tolist() == [1.0, 1.0]
