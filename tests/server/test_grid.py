"""Requests to sites and replies from them, with a grid whose nodes do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from chexfound import wire
from chexfound.errors import ConfigError, DataError, ProtocolError, SiteError
from chexfound.phases import Reply, Request
from server.flwr_private import LocalGrid, set_identity
from server.grid import GridExchange

ENROLMENT: dict[str, Any] = {
    "site": "A",
    "images": 10,
    "patients": 8,
    "train": 6,
    "val": 1,
    "test": 3,
    "findings": {"Blob": {"positives": 2, "negatives": 3}},
    "versions": {"chexfound": "0.1.0", "torch": "2", "python": "3"},
    "store_sha256": "0" * 64,
}


def enrolment(**changes: Any) -> Reply:
    return Reply(values=ENROLMENT | changes)


class Scripted(LocalGrid):
    """Nodes that answer with what `answers[node]` makes of a request; None: never."""

    def __init__(self, answers: dict[int, Callable[[Message], Message | None]]) -> None:
        set_identity(1)
        self.answers, self.asked, self.pulled = answers, {}, []  # type: ignore[var-annotated]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for number, message in enumerate(messages, start=len(self.asked)):
            self.asked[str(number)] = message
            yield str(number)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            message = self.asked[name]
            reply = self.answers[message.metadata.dst_node_id](message)
            if reply is not None:
                self.pulled.append(message.metadata.dst_node_id)
                yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def node(name: str, later: Callable[[Message], Message | None] | None = None, **changes: Any) -> Any:
    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == "query.enrol" or later is None:
            return Message(wire.pack_reply(enrolment(**{"site": name} | changes)), reply_to=message)
        return later(message)

    return answer


@pytest.fixture
def quick(tiny_recipe: Any) -> Any:
    return replace(tiny_recipe, federation=replace(tiny_recipe.federation, wait_s=0.01, round_timeout_s=0.2))


def test_the_roster_is_sorted_by_name_and_not_by_node(quick: Any) -> None:
    grid = Scripted({7: node("B"), 9: node("A"), 8: node("C")})
    exchange = GridExchange(grid)
    assert [member.name for member in exchange.enrol(quick)] == ["A", "B", "C"]
    grid.pulled.clear()
    replies = exchange.ask([Request(phase="pretrain", roster_index=index) for index in range(3)])
    next(replies)
    assert grid.pulled == [9]  # one at a time: no more than one update is held
    assert [reply.values["site"] for reply in replies] == ["B", "C"]
    assert grid.pulled == [9, 7, 8]


def test_each_site_gets_its_own_request(quick: Any) -> None:
    grid = Scripted({7: node("B"), 9: node("A")})
    exchange = GridExchange(grid)
    exchange.enrol(quick)
    grid.asked.clear()
    list(exchange.ask([Request(phase="adapt", roster_index=index, round=4, steps=1) for index in range(2)]))
    seen = {message.metadata.dst_node_id: message for message in grid.asked.values()}
    assert {node: wire.unpack_request(message.content).roster_index for node, message in seen.items()} == {9: 0, 7: 1}
    assert {message.metadata.message_type for message in seen.values()} == {"train.adapt"}
    assert {message.metadata.group_id for message in seen.values()} == {
        "5"
    }  # only shown in the logs, where the first is 1
    assert {message.metadata.ttl for message in seen.values()} == {0.2}


def test_too_few_sites(quick: Any) -> None:
    told: list[Any] = []
    with pytest.raises(
        SiteError, match=r"only 1 of federation.min_sites 2 sites connected within 0.01 s; start the others"
    ):
        GridExchange(Scripted({1: node("A")}), lambda *counts: told.append(counts)).enrol(quick)
    assert told == [(1, 2)]


def test_a_name_taken_twice(quick: Any) -> None:
    with pytest.raises(ConfigError, match="two sites call themselves 'A'; give each its own --name"):
        GridExchange(Scripted({1: node("A"), 2: node("A")})).enrol(quick)


def ask_two(quick: Any, later: Any) -> None:
    exchange = GridExchange(Scripted({1: node("A"), 2: node("B", later)}))
    exchange.enrol(quick)
    list(exchange.ask([Request(phase="pretrain", round=2, steps=1)] * 2))


@pytest.mark.parametrize("kind", [DataError, SiteError, ConfigError])
def test_an_error_names_the_site_and_its_code(quick: Any, kind: Any) -> None:
    with pytest.raises(
        SiteError, match=f"site 'B' in pretrain, round 3: replied with error '{kind.code}' .exit code {kind.exit_code}"
    ):
        ask_two(quick, lambda message: wire.pack_error(kind("Jane Doe"), message))


def test_a_site_that_does_not_answer(quick: Any) -> None:
    with pytest.raises(
        SiteError, match=r"site 'B' in pretrain, round 3: no reply within federation.round_timeout_s 0.2 s"
    ):
        ask_two(quick, lambda message: None)


def test_a_reply_that_cannot_be_read_names_the_site(quick: Any) -> None:
    with pytest.raises(ProtocolError, match="site 'B' in pretrain, round 3: the message holds no readable 'reply'"):
        ask_two(quick, lambda message: Message(RecordDict(), reply_to=message))


def test_a_node_that_is_gone_at_push(quick: Any, monkeypatch: Any) -> None:
    grid = Scripted({1: node("A"), 2: node("B")})
    exchange = GridExchange(grid)
    exchange.enrol(quick)
    monkeypatch.setattr(grid, "push_messages", lambda messages: ["0"])
    with pytest.raises(SiteError, match="no longer connected; start it again and resume"):
        list(exchange.ask([Request(phase="pretrain")] * 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "<\n>"}, "node 7 enrolled without a usable name"),
        ({"train": 2**39}, "site 'B' enrolled without counts that add up: 10 images of 8 patients"),
        ({"patients": 11}, "site 'B' enrolled without counts that add up"),
        ({"store_sha256": "g" * 64}, "site 'B' enrolled without its store's hash"),
    ],
)
def test_a_bad_enrolment_names_its_sender(quick: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        GridExchange(Scripted({9: node("A"), 7: node("B", **change)})).enrol(quick)
