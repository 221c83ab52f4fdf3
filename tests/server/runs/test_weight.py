"""Sentences about sites that weigh much."""

from __future__ import annotations

from server.runs.weight import warnings


def test_ten_times_the_median_is_told_and_so_is_who_was_cut() -> None:
    roster = [{"site": "a", "train": 10}, {"site": "b", "train": 20}, {"site": "c", "train": 900}]
    assert [text.split(" as many")[0] for text in warnings({"event": "start", "roster": roster})] == ["c has 45 times"]
    assert warnings({"event": "start", "roster": [{"site": "a"}]}) == []  # under masks nobody knows
    told = warnings({"event": "round", "sites": [], "capped": {"c": 0.9677}})
    assert told == ["c would be 97% of the sum: its weight is cut to the ceiling"]
