from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from server.federation.members import Node
from server.runs import display
from server.runs.follow import Follower


def shown(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page(submitted, live, happened) -> None:
    happened(submitted, "start", 0, 1)
    live(submitted, "pretrain", round=3, rounds=3, waiting_for=["SOUTH"], replied=["NORTH"])
    text = shown(display.page(Follower(submitted), {"NORTH": Node("1", "online", "then")}))
    assert "first in thorax: pretrain, round 3 of 3, waiting for SOUTH, for " in text
    assert "2 of 3 rounds" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(("NORTH", "SOUTH"))}
    assert rows["NORTH"].split() == ["NORTH", "42", "9.0000", "online", "since", "then", "replied"]
    assert rows["SOUTH"].split() == ["SOUTH", "34", "10.0000", "not", "known", "waited", "for"]
    assert "down 54.0 MB, up 53.9 MB" in text
    assert "loss, pretrain: 9.5000 to 9.5000" in text


def test_under_secure_aggregation_all_sites_together_have_a_row(submitted, live, happened) -> None:
    happened(submitted, "summed start", "summed round")
    live(submitted, "pretrain", round=2, rounds=3, waiting_for=["SOUTH"], replied=["EAST", "NORTH"])
    text = shown(display.page(Follower(submitted), {}))
    rows = [line.split() for line in text.splitlines() if line.startswith(("EAST", "NORTH", "SOUTH", "all sites"))]
    assert rows == [
        ["EAST", "not", "known", "replied"],
        ["NORTH", "not", "known", "replied"],
        ["SOUTH", "not", "known", "waited", "for"],
        ["all", "sites", "76", "9.0000"],
    ]


def test_a_run_that_has_not_begun(submitted, flwr) -> None:
    flwr.statuses["100"] = "pending"
    text = shown(display.page(Follower(submitted), {}, plain=True))
    assert "submitted, not begun" in text
    assert "NORTH" in text


def test_a_curve_falls_from_the_left_to_the_right() -> None:
    assert display.draw([3.0, 2.0, 1.0, 0.0], 4, 2, plain=True) == ["**", "  **"]
    lines = display.draw([1.0, 0.0], 8, 3)
    assert [len(line) for line in lines] == sorted(len(line) for line in lines)
    assert ord(lines[0][0]) & 0x01  # the top left of its dots
    assert ord(lines[-1][-1]) & 0x80  # the bottom right


def test_a_curve_without_a_slope_or_of_one_point() -> None:
    assert display.draw([5.0, 5.0], 4, 3, plain=True) == ["", "****", ""]
    assert display.draw([5.0], 4, 1, plain=True) == [""]


@pytest.mark.parametrize("count", [2, 57, 1000])
def test_any_number_of_points_fits(count: int) -> None:
    lines = display.draw([float(number % 7) for number in range(count)], 20, 4)
    assert len(lines) == 4
    assert max(map(len, lines)) == 20
