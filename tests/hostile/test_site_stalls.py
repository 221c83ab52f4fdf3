"""A registered site that wants to hold up the others: what it says of itself costs it its own place, and no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID

from chexfound.contract.request import Reply
from server.exchange import grid as grid_module
from server.exchange.protocol import Missing
from tests.server.exchange.test_grid import SOUTH, pretrain, secured

HOUR_S = 3600.0


@pytest.fixture
def slow_round(tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A round that may take an hour; the coordinator looks who is there as often as it does."""
    monkeypatch.setattr(grid_module, "LOOK_S", 0.1)
    federation = replace(tiny_recipe.federation, wait_s=0.01, round_timeout_s=HOUR_S, quorum_sites=1)
    return replace(tiny_recipe, federation=federation)


@pytest.fixture(autouse=True)
def in_seconds() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20, "the others waited for it"


def error(code: int, reason: str = "") -> Callable[[Message], Message]:
    return lambda message: Message(Error(code=code, reason=reason), reply_to=message)


@pytest.mark.parametrize("code", [*range(9), 99, -1])
def test_a_site_that_answers_with_flowers_own_error_codes_loses_only_itself(slow_round: Any, code: int) -> None:
    """Codes 3, 4 and 5 are the SuperLink's word for a message that is lost; 8 is a node's for a worker that died."""
    grid, exchange, told = secured(error(code))
    exchange.enrol(slow_round)
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == {3: "protocol", 4: "protocol", 5: "protocol", 8: "gone"}.get(code, "internal")
    assert "site 'SOUTH'" in str(second.error)
    assert {one["site"] for one in told if one["event"] in ("lost", "refused")} == {"SOUTH"}
    grid.answers[2] = SOUTH.answer
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))  # the next round is as any other


@pytest.mark.parametrize("reason", ["secagg.plain", "data", "x" * 10_000, "\x1b[2J"])
def test_a_site_that_dresses_such_a_code_as_ours_loses_only_itself(slow_round: Any, reason: str) -> None:
    _, exchange, _ = secured(error(5, reason))
    exchange.enrol(slow_round)
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert len(str(second.error)) < 1000
    assert "\x1b" not in str(second.error)


def test_a_site_whose_replies_are_never_whole_is_given_up(slow_round: Any) -> None:
    """It announces a reply and never uploads it: the SuperLink says each time that it is gone."""

    def vanished(message: Message) -> Message:
        said = error(4)(message)
        said.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return said

    grid, exchange, _ = secured(vanished)
    exchange.enrol(slow_round)
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == "gone"
    assert len(grid.asked) == 4 + grid_module.AGAIN_MAX


def test_a_site_that_signs_on_again_and_again_is_given_up(slow_round: Any) -> None:
    """Each time it is asked anew, since what a node had in hand is lost when it ends."""
    grid, exchange, _ = secured(lambda message: None)
    exchange.enrol(slow_round)
    started = iter(range(10**9))

    def again() -> None:
        grid.started[2] = str(next(started))

    grid.looked = again
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == "gone"
