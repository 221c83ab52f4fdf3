"""Requests to sites and replies from them, with a grid whose nodes do as they are told."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable import inflatable_utils

from chexfound.contract.request import PartRequest, Reply, Request
from chexfound.errors import ChexfoundError, ConfigError, DataError, ProtocolError, RefusedError, SiteError
from chexfound.identity import signing
from chexfound.identity.roster import Keys, Roster
from chexfound.wire import arrays, envelopes, error_replies, signatures
from client.answer.delivery import Parts
from client.home.policy import Policy
from server.exchange import grid as grid_module
from server.exchange.flwr_private import LocalGrid, set_identity
from server.exchange.grid import GridExchange
from server.exchange.protocol import Member, Missing

ENROLMENT: dict[str, Any] = {
    "site": "A",
    "images": 10,
    "patients": 8,
    "train": 6,
    "val": 1,
    "test": 3,
    "findings": {"Blob": {"positives": 2, "negatives": 3}},
    "versions": {"chexfound": "0.1.0", "torch": "2", "python": "3"},
    "store_hmac": "0" * 64,
    "cells": 0,
    "withheld": False,
}
RUN = 1
Answer = Callable[[Message], Message | None]


class Scripted(LocalGrid):
    """Nodes that answer with what `answers[node]` makes of a request; None: not yet.

    `started[node]` is when it was started last; a node that is not in `online` is not connected.
    """

    def __init__(self, answers: dict[int, Answer], keys: dict[int, bytes] | None = None) -> None:
        set_identity(RUN)
        self.answers, self.keys = answers, keys or {}
        self.online, self.started = set(answers), dict.fromkeys(answers, "1")
        self.asked: dict[str, Message] = {}
        self.pulled: list[int] = []
        self.looked: Callable[[], None] = lambda: None  # at each look, the first not counted

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looked()
        return [
            NodeInfo(node_id=node, last_activated_at=self.started[node], public_key=self.keys.get(node, b""))
            for node in sorted(self.online, reverse=True)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for number, message in enumerate(messages, start=len(self.asked)):
            message.metadata.__dict__["_message_id"] = str(number)
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


def enrolment(name: str, **changes: Any) -> Reply:
    return Reply(values=ENROLMENT | {"site": name} | changes)


def node(name: str, later: Answer | None = None, **changes: Any) -> Answer:
    def answer(message: Message) -> Message | None:
        if message.metadata.message_type == "query.enrol" or later is None:
            return Message(envelopes.pack_reply(enrolment(name, **changes)), reply_to=message)
        return later(message)

    return answer


def gone(message: Message) -> Message:
    """As the SuperLink answers for a node that is not connected."""
    said = Message(Error(code=5, reason="Node unavailable"), reply_to=message)
    said.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    return said


def in_turn(*answers: Answer) -> Answer:
    left = list(answers)
    return lambda message: (left.pop(0) if len(left) > 1 else left[0])(message)


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(grid_module, "LOOK_S", 0.0)


def set_federation(recipe: Any, **values: Any) -> Any:
    return replace(recipe, federation=replace(recipe.federation, **values))


@pytest.fixture
def quick(tiny_recipe: Any) -> Any:
    return set_federation(tiny_recipe, wait_s=0.01, round_timeout_s=0.3)


@pytest.fixture
def patient(tiny_recipe: Any) -> Any:
    return set_federation(tiny_recipe, wait_s=0.01, round_timeout_s=30.0)


def pretrain(sites: int) -> list[Request]:
    return [Request(phase="pretrain", round=2, steps=1, roster_index=index) for index in range(sites)]


# -- who takes part


def test_the_roster_is_sorted_by_name_and_not_by_node(quick: Any) -> None:
    grid = Scripted({7: node("B"), 9: node("A"), 8: node("C")})
    exchange = GridExchange(grid)
    assert [member.name for member in exchange.enrol(quick)] == ["A", "B", "C"]
    grid.pulled.clear()
    replies = exchange.ask(pretrain(3))
    next(replies)
    assert grid.pulled == [9]  # one at a time: no more than one update is held
    assert [reply.values["site"] for reply in replies] == ["B", "C"]  # type: ignore[union-attr]
    assert grid.pulled == [9, 7, 8]


def test_each_site_gets_its_own_request(quick: Any) -> None:
    grid = Scripted({7: node("B"), 9: node("A")})
    exchange = GridExchange(grid)
    exchange.enrol(quick)
    grid.asked.clear()
    list(exchange.ask([Request(phase="adapt", roster_index=index, round=4, steps=1) for index in range(2)]))
    seen = {message.metadata.dst_node_id: message for message in grid.asked.values()}
    assert {node: envelopes.unpack_request(message.content).message.roster_index for node, message in seen.items()} == {
        9: 0,
        7: 1,
    }
    assert {message.metadata.message_type for message in seen.values()} == {"train.adapt"}
    assert {message.metadata.group_id for message in seen.values()} == {"5"}  # shown in logs, where the first is 1
    assert all(0 < message.metadata.ttl - grid_module.GRACE_S <= 0.3 for message in seen.values())


def test_a_site_that_is_not_asked_gives_nothing(quick: Any) -> None:
    grid = Scripted({1: node("A"), 2: node("B")})
    exchange = GridExchange(grid)
    exchange.enrol(quick)
    grid.asked.clear()
    first, second = exchange.ask([None, Request(phase="features", roster_index=1)])
    assert first is None
    assert isinstance(second, Reply)
    assert [message.metadata.dst_node_id for message in grid.asked.values()] == [2]


def test_too_few_sites(quick: Any) -> None:
    told: list[Any] = []
    with pytest.raises(
        SiteError, match=r"only 1 of federation.min_sites 2 sites connected within 0.01 s; start the others"
    ):
        GridExchange(Scripted({1: node("A")}), on_event=told.append).enrol(quick)
    assert told == [{"event": "wait", "sites": 1, "of": 2}]


def test_a_name_taken_twice(quick: Any) -> None:
    with pytest.raises(ConfigError, match="two sites call themselves 'A'; give each its own --name"):
        GridExchange(Scripted({1: node("A"), 2: node("A")})).enrol(quick)


def test_a_run_that_goes_on_waits_for_all_its_sites(quick: Any) -> None:
    before = [Member(name=name, values=enrolment(name).values) for name in "ABC"]
    exchange = GridExchange(Scripted({1: node("A"), 2: node("B")}))
    with pytest.raises(SiteError, match="only 2 of the 3 sites connected"):
        exchange.enrol(quick, before)
    with_quorum = set_federation(quick, quorum_sites=2)
    assert exchange.enrol(with_quorum, before) == before


def test_others_that_came_meanwhile_are_not_of_the_run(quick: Any) -> None:
    before = [Member(name=name, values=enrolment(name).values) for name in "AB"]
    exchange = GridExchange(Scripted({1: node("A"), 2: node("B"), 3: node("Z")}))
    assert exchange.enrol(quick, before) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "<\n>"}, "node 7 enrolled without a usable name"),
        ({"train": 2**39}, "site 'B' enrolled without counts that add up: 10 images of 8 patients"),
        ({"store_hmac": "g" * 64}, "site 'B' enrolled without its store's hash"),
        ({"versions": ENROLMENT["versions"] | {"chexfound": "9"}}, "site 'B' runs federated CheXFound '9'"),
    ],
)
def test_a_bad_enrolment_names_its_sender(quick: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        GridExchange(Scripted({9: node("A"), 7: node("B", **change)})).enrol(quick)


def test_with_a_quorum_a_bad_enrolment_is_one_that_did_not_come(quick: Any) -> None:
    """Else any one site ends every run, also one that could do without it."""
    told: list[dict[str, Any]] = []
    nodes = {1: node("A"), 2: node("B"), 3: node("C", store_hmac="?")}
    exchange = GridExchange(Scripted(nodes), on_event=told.append)
    members = exchange.enrol(set_federation(quick, min_sites=2, quorum_sites=2))
    assert [member.name for member in members] == ["A", "B"]
    assert [(one["site"], one["reason"]) for one in told if one["event"] == "refused"] == [("node 3", "protocol")]


# -- replies that do not come


def second_of(recipe: Any, later: Answer, told: list[Any] | None = None) -> Missing:
    exchange = GridExchange(Scripted({1: node("A"), 2: node("B", later)}), on_event=told.append if told else None)
    exchange.enrol(recipe)
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    return second


@pytest.mark.parametrize("kind", [DataError, SiteError, ConfigError])
def test_an_error_names_the_site_and_its_code(quick: Any, kind: Any) -> None:
    told: list[dict[str, Any]] = [{}]
    missing = second_of(quick, lambda message: error_replies.pack_error(kind("Jane Doe"), message), told)
    assert missing.reason == kind.code
    assert told[-1] == {"event": "refused", "phase": "pretrain", "round": 2, "site": "B", "reason": kind.code}
    assert type(missing.error) is SiteError
    assert f"site 'B' in pretrain, round 3: replied with error '{kind.code}' (exit code {kind.exit_code})" in str(
        missing.error
    )
    assert "Jane" not in str(missing.error)


def test_a_site_that_gives_sums_alone_needs_another_run(quick: Any) -> None:
    """Resumed, a run in the clear would be refused again."""
    missing = second_of(quick, lambda message: error_replies.pack_error(RefusedError("secagg.plain"), message))
    assert missing.reason == "secagg.plain"
    assert type(missing.error) is ConfigError
    assert str(missing.error).endswith("Begin another, with --set aggregation=secagg")


def test_a_site_that_does_not_answer_is_late(quick: Any) -> None:
    told: list[dict[str, Any]] = [{}]
    missing = second_of(quick, lambda message: None, told)
    assert missing.reason == "late"
    assert told[-1] == {"event": "lost", "phase": "pretrain", "round": 2, "site": "B", "reason": "late"}
    assert str(missing.error) == "site 'B' in pretrain, round 3: no reply within 0.3 s"


def test_a_reply_that_cannot_be_read_names_the_site(quick: Any) -> None:
    missing = second_of(quick, lambda message: Message(RecordDict(), reply_to=message))
    assert missing.reason == "protocol"
    assert "site 'B' in pretrain, round 3: the message holds no readable 'reply'" in str(missing.error)


def never_inflated(message: Message) -> Message:
    raise KeyError("as Flower says of an object that is none")


def empty(message: Message) -> Message:
    reply = Message(RecordDict(), reply_to=message)
    reply.__dict__["_content"] = None
    return reply


@pytest.mark.parametrize("later", [never_inflated, empty])
def test_a_reply_that_flower_cannot_read_is_its_sites_fault(quick: Any, later: Answer) -> None:
    """It ended the run, of whatever quorum: the objects of a reply are named by their hash, and hold anything."""
    missing = second_of(quick, later)
    assert missing.reason == "protocol"
    assert "site 'B' in pretrain, round 3: " in str(missing.error)


def test_the_parts_of_a_reply_are_waited_for_until_the_deadline(quick: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(inflatable_utils.pull_objects.__kwdefaults__, "max_time", 7200)
    limits: list[float] = []
    second_of(quick, lambda message: limits.append(inflatable_utils.pull_objects.__kwdefaults__["max_time"]))
    assert 0 <= limits[-1] <= limits[0] <= 0.3

    def unavailable(object_id: str) -> bytes:
        raise inflatable_utils.ObjectUnavailableError(object_id)

    with pytest.raises(inflatable_utils.ObjectPullError):
        inflatable_utils.pull_objects(["0" * 64], unavailable, initial_backoff=0.01)


def test_a_node_without_a_key_does_not_come_back(patient: Any) -> None:
    assert "no longer connected; start it again and resume" in str(second_of(patient, gone).error)


# -- sites with keys, which do


class Hospital:
    """Its keys, and its node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._node, self.identity = ec.generate_private_key(ec.SECP384R1()).public_key(), Ed25519PrivateKey.generate()
        formats = serialization.PublicFormat
        openssh = self._node.public_bytes(serialization.Encoding.OpenSSH, formats.OpenSSH)
        self.keys = Keys(openssh.decode(), signing.public_line(self.identity.public_key()))
        self.pem = self._node.public_bytes(serialization.Encoding.PEM, formats.SubjectPublicKeyInfo)

    def answer(self, message: Message, **changes: Any) -> Message:
        content = envelopes.pack_reply(enrolment(self.name))
        asked = {
            "key": self.identity,
            "run_id": message.metadata.run_id,
            "round_number": envelopes.unpack_request(message.content).message.round,
            "message_id": message.metadata.message_id,
        } | changes
        signatures.sign_reply(content, **asked)
        return Message(content, reply_to=message)


NORTH, SOUTH = Hospital("NORTH"), Hospital("SOUTH")
SITES = Roster(federation="thorax", serial=2, sites={"NORTH": NORTH.keys, "SOUTH": SOUTH.keys})


def secured(
    south: Answer | None = None, online: Iterable[int] = (1, 2)
) -> tuple[Scripted, GridExchange, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    grid = Scripted({1: NORTH.answer, 2: node("SOUTH", south) if south else SOUTH.answer}, {1: NORTH.pem, 2: SOUTH.pem})
    if south:  # enrolled as it should be
        grid.answers[2] = lambda message: (
            SOUTH.answer(message) if message.metadata.message_type == "query.enrol" else south(message)
        )
    grid.online = set(online)
    return grid, GridExchange(grid, sites=SITES, run_id=RUN, on_event=told.append), told


def events(told: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one["event"], one["site"]) for one in told if one["event"] in ("lost", "back")]


def test_what_a_site_grants_is_told_under_the_name_of_its_key(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that calls itself by another's name changes nothing of what is remembered of that one."""
    granted = Policy().limits(2)
    monkeypatch.setitem(ENROLMENT, "policy", granted.as_dict())
    _, exchange, told = secured()
    with contextlib.suppress(ChexfoundError):  # the recipe of these tests is too small for the policy
        exchange.enrol(quick)
    assert [(one["site"], one["limits"]) for one in told if one["event"] == "policy"][:1] == [("NORTH", granted)]
    lone = GridExchange(exchange.grid, run_id=RUN, on_event=told.append)
    told.clear()
    with contextlib.suppress(ChexfoundError):
        lone.enrol(quick)
    assert not [one for one in told if one["event"] == "policy"]  # nobody's key says whose it is


def test_signed_replies_count(quick: Any) -> None:
    _, exchange, told = secured()
    assert [member.name for member in exchange.enrol(quick)] == ["NORTH", "SOUTH"]
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))
    assert events(told) == []


@pytest.mark.parametrize(
    "forge",
    [
        lambda message: NORTH.answer(message),  # a reply signed by another site
        lambda message: Message(envelopes.pack_reply(enrolment("SOUTH")), reply_to=message),  # by nobody
        lambda message: SOUTH.answer(message, run_id=2),
        lambda message: SOUTH.answer(message, round_number=1),
        lambda message: SOUTH.answer(message, message_id="0"),  # an answer to another request
    ],
)
def test_a_reply_that_its_site_did_not_sign_does_not_count(quick: Any, forge: Answer) -> None:
    _, exchange, _ = secured(forge)
    exchange.enrol(quick)
    first, second = exchange.ask(pretrain(2))
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == "protocol"
    assert "sign" in str(second.error)


def test_a_changed_payload_does_not_count(quick: Any) -> None:
    def changed(message: Message) -> Message:
        reply = SOUTH.answer(message)
        reply.content["reply"]["json"] = reply.content["reply"]["json"].replace('"images": 10', '"images": 11')
        return reply

    _, exchange, _ = secured(changed)
    exchange.enrol(quick)
    assert isinstance(list(exchange.ask(pretrain(2)))[1], Missing)


def test_a_site_cannot_enrol_under_another_name(quick: Any) -> None:
    grid, exchange, _ = secured()
    other = Hospital("SOUTH")
    other.name, other.identity = "NORTH", SOUTH.identity
    grid.answers[2] = other.answer
    with pytest.raises(ProtocolError, match="site 'SOUTH' in enrol: says another name than that of its keys"):
        exchange.enrol(quick)


def test_a_node_that_is_not_in_the_federation_is_not_asked(quick: Any) -> None:
    grid, exchange, _ = secured()
    grid.answers[3], grid.keys[3], grid.started[3] = node("STRANGER"), Hospital("STRANGER").pem, "1"
    grid.online.add(3)
    assert [member.name for member in exchange.enrol(quick)] == ["NORTH", "SOUTH"]


def test_a_site_that_was_started_again_is_asked_again(patient: Any) -> None:
    """Its node is another process now, and what it had in hand is lost."""
    grid, exchange, told = secured(in_turn(*[lambda message: None] * 3, SOUTH.answer))
    exchange.enrol(patient)
    looks = iter(range(10**9))

    def restart() -> None:
        if next(looks) == 1:
            grid.started[2] = "2"

    grid.looked = restart
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))
    asked = [message for message in grid.asked.values() if message.metadata.dst_node_id == 2]
    assert [message.metadata.message_type for message in asked] == ["query.enrol", "train.pretrain", "train.pretrain"]
    assert events(told) == [("lost", "SOUTH"), ("back", "SOUTH")]


def test_a_link_that_was_down_is_waited_for(patient: Any) -> None:
    """The same process is there again, at its work: nothing is asked twice."""
    grid, exchange, told = secured(in_turn(*[lambda message: None] * 6, SOUTH.answer))
    exchange.enrol(patient)
    looks = iter(range(10**9))

    def flap() -> None:
        look = next(looks)
        grid.online = {1} if look in (1, 2) else {1, 2}

    grid.looked = flap
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))
    assert len(grid.asked) == 4
    assert events(told) == [("lost", "SOUTH"), ("back", "SOUTH")]


def test_flowers_word_that_a_node_is_gone_is_not_the_last(patient: Any) -> None:
    grid, exchange, told = secured(in_turn(gone, SOUTH.answer))
    exchange.enrol(patient)
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))
    assert len(grid.asked) == 5
    assert events(told) == [("lost", "SOUTH"), ("back", "SOUTH")]


def test_a_site_that_always_dies_of_it_is_given_up(patient: Any) -> None:
    crashed = lambda message: Message(Error(code=8, reason=""), reply_to=message)  # noqa: E731
    grid, exchange, told = secured(crashed)
    exchange.enrol(patient)
    began = time.monotonic()
    _, second = exchange.ask(pretrain(2))
    assert time.monotonic() - began < 15  # of the 30 that the round may take
    assert isinstance(second, Missing)
    assert (second.reason, "has lost what it was asked 9 times" in str(second.error)) == ("gone", True)
    assert len(grid.asked) == 4 + grid_module.AGAIN_MAX
    assert events(told)[-1] == ("lost", "SOUTH")


def test_a_site_that_stays_away_is_waited_for_once(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the deadline of the request that lost it; then shortly, until it is there again."""
    monkeypatch.setattr(grid_module, "AWAY_S", 0.5)
    grid, exchange, told = secured(lambda message: SOUTH.answer(message) if 2 in grid.online else None)
    exchange.enrol(quick)
    grid.online = {1}
    assert list(exchange.ask(pretrain(2), 3.0))[1].reason == "gone"  # type: ignore[union-attr]
    began = time.monotonic()
    assert list(exchange.ask(pretrain(2), 60.0))[1].reason == "gone"  # type: ignore[union-attr]
    assert time.monotonic() - began < 30
    grid.online = {1, 2}
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2), 60.0))
    looks = iter(range(10**9))

    def away_and_back() -> None:
        grid.online = {1} if next(looks) < 2 else {1, 2}

    grid.looked = away_and_back  # it has been there, and so it is waited for again
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2), 60.0))
    assert events(told)[-1] == ("back", "SOUTH")


def test_a_site_that_is_away_when_a_run_goes_on_may_come_later(patient: Any) -> None:
    grid, exchange, told = secured(online=[1])
    before = [Member(name=name, values=enrolment(name).values) for name in ("NORTH", "SOUTH")]
    exchange.enrol(set_federation(patient, quorum_sites=1), before)
    looks = iter(range(10**9))

    def come() -> None:
        if next(looks) == 2:
            grid.online.add(2)

    grid.looked = come
    assert all(isinstance(reply, Reply) for reply in exchange.ask(pretrain(2)))
    assert events(told)[-1] == ("back", "SOUTH")


# -- several sites, of which one takes all the time; and arrays that come in parts


def test_a_site_that_is_late_does_not_make_those_after_it_late(quick: Any) -> None:
    """Their replies are there: they are only looked at when its turn is over."""
    grid = Scripted({1: node("A", lambda message: None), 2: node("B"), 3: node("C")})
    exchange = GridExchange(grid)
    exchange.enrol(quick)
    first, *others = exchange.ask(pretrain(3))
    assert isinstance(first, Missing)
    assert first.reason == "late"
    assert all(isinstance(reply, Reply) for reply in others)


class InParts:
    """Sites with keys that take and give arrays in parts; `killed`: once that happens to it, it is started again."""

    def __init__(self, folder: Path, killed: str = "", at: int = 0) -> None:
        self.folder, self.killed, self.at = folder, killed, at
        self.order: list[tuple[str, str]] = []
        self.down, self.gone = False, set[str]()
        self.told: list[dict[str, Any]] = []
        nodes: dict[int, Answer] = {1: lambda message: self.answer(NORTH, message), 2: self.south}
        self.grid = Scripted(nodes, {1: NORTH.pem, 2: SOUTH.pem})
        self.grid.looked = self.restart
        self.exchange = GridExchange(
            self.grid, sites=SITES, run_id=RUN, spool=folder / "spool", on_event=self.told.append
        )

    def south(self, message: Message) -> Message | None:
        stage = message.metadata.message_type
        if stage == self.killed and not self.down and self.stages("SOUTH").count(stage) == self.at:
            self.down = True
        if self.down:  # what a killed site had taken is gone with it, also when it is back
            self.gone.add(message.metadata.message_id)
        return None if message.metadata.message_id in self.gone else self.answer(SOUTH, message)

    def restart(self) -> None:
        if self.down:
            self.grid.started[2], self.killed, self.down = "2", "", False

    def stages(self, name: str) -> list[str]:
        return [stage for site, stage in self.order if site == name]

    def answer(self, hospital: Hospital, message: Message) -> Message:
        self.order.append((hospital.name, message.metadata.message_type))
        if message.metadata.message_type == "query.enrol":
            return hospital.answer(message)
        came = envelopes.unpack_request(message.content)
        request, parts = came.message, Parts(self.folder / hospital.name, RUN)
        keep = None
        if isinstance(request, PartRequest):
            reply = parts.answer(request)
        else:
            if came.detached is not None:
                request = arrays.with_arrays(request, came.detached, parts.received(came.detached))
            reply, keep = Reply(tensors={"x": request.tensors["x"] + len(hospital.name)}), parts.keep
        content = envelopes.pack_reply(reply, keep)
        signatures.sign_reply(content, hospital.identity, RUN, request.round, message.metadata.message_id)
        return Message(content, reply_to=message)

    def ask(self) -> list[Reply | Missing | None]:
        tensors = {"x": torch.arange(1000.0)}
        return list(self.exchange.ask([replace(request, tensors=tensors) for request in pretrain(2)]))


@pytest.fixture
def parted(patient: Any) -> Any:
    return set_federation(patient, part_mb=0.001)


PARTS = ["query.deliver"] * 4 + ["train.pretrain"] + ["query.collect"] * 4


def test_sites_take_and_give_their_parts_side_by_side(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(parted)
    sites.order.clear()
    replies = sites.ask()
    assert all(
        isinstance(reply, Reply) and torch.equal(reply.tensors["x"], torch.arange(1000.0) + 5) for reply in replies
    )
    assert sites.stages("NORTH") == sites.stages("SOUTH") == PARTS
    first = [name for name, _ in sites.order]
    assert first.index("SOUTH") < 3  # not when all of the other is done
    assert list((tmp_path / "spool").iterdir()) == []
    assert [event["event"] for event in sites.told if event.get("phase") == "pretrain"] == [
        "asked",
        "replied",
        "replied",
    ]


@pytest.mark.parametrize("killed", ["query.deliver", "train.pretrain", "query.collect"])
def test_a_site_that_is_killed_between_parts_goes_on_with_the_next(parted: Any, tmp_path: Path, killed: str) -> None:
    sites = InParts(tmp_path, killed, at=0 if killed == "train.pretrain" else 2)
    sites.exchange.enrol(parted)
    sites.order.clear()
    assert all(isinstance(reply, Reply) for reply in sites.ask())
    assert sites.stages("SOUTH") == PARTS
    assert events(sites.told) == [("lost", "SOUTH"), ("back", "SOUTH")]


def test_a_site_that_dies_between_parts_is_missing_and_the_others_are_not(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path, "query.collect", at=2)
    sites.exchange.enrol(set_federation(parted, round_timeout_s=4.0))
    sites.grid.looked = lambda: None
    first, second = sites.ask()
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == "late"


def test_a_site_whose_arrays_are_not_what_it_signed_is_refused(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(parted)

    def spoil(message: Message) -> Message | None:
        if message.metadata.message_type == "query.collect":
            (path,) = (tmp_path / "SOUTH" / "parts" / str(RUN)).glob("out-*")
            path.write_bytes(bytes(path.stat().st_size))
        return sites.answer(SOUTH, message)

    sites.grid.answers[2] = spoil
    first, second = sites.ask()
    assert isinstance(first, Reply)
    assert isinstance(second, Missing)
    assert second.reason == "protocol"
    assert "site 'SOUTH' in pretrain, round 3: sends other arrays than its reply says" in str(second.error)
    assert [event["site"] for event in sites.told if event["event"] == "refused"] == ["SOUTH"]


def test_a_reply_that_does_not_come_whole_holds_up_nobody_else(parted: Any, tmp_path: Path) -> None:
    """Flower shows a reply before its objects are there, and waits for them as it pulls."""
    sites = InParts(tmp_path)
    sites.exchange.enrol(set_federation(parted, round_timeout_s=8.0))
    never, pull = threading.Event(), sites.grid.pull_messages

    def slow(message_ids: Iterable[str]) -> Iterable[Message]:
        names = list(message_ids)
        if any(sites.grid.asked[name].metadata.dst_node_id == 1 for name in names):
            never.wait(60)
            return []
        return list(pull(names))

    sites.grid.pull_messages = slow  # type: ignore[method-assign]
    first, second = sites.ask()
    never.set()
    assert isinstance(first, Missing)
    assert first.reason == "late"
    assert isinstance(second, Reply)


def test_a_site_that_is_done_is_not_asked_again_when_it_starts_again(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(parted)
    sites.order.clear()
    looks = iter(range(10**9))

    def north(message: Message) -> Message | None:
        done = sites.stages("SOUTH") == PARTS
        if done:
            sites.grid.started[2] = "2"
        return sites.answer(NORTH, message) if done and next(looks) > 3 else None

    sites.grid.answers[1] = north
    assert all(isinstance(reply, Reply) for reply in sites.ask())
    assert sites.stages("SOUTH") == PARTS
    assert events(sites.told) == []


def test_a_site_that_is_not_listed_at_one_moment_is_asked_once(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(parted)
    sites.order.clear()
    looks = iter(range(10**9))
    sites.grid.looked = lambda: (sites.grid.online.discard if next(looks) % 2 else sites.grid.online.add)(2)
    assert all(isinstance(reply, Reply) for reply in sites.ask())
    assert sites.stages("SOUTH") == PARTS


def test_a_reply_that_is_larger_than_its_request_is_in_time_behind_one_that_is_late(
    parted: Any, tmp_path: Path
) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(set_federation(parted, round_timeout_s=4.0, part_mb=0.0041))
    sites.grid.answers[1] = lambda message: None
    answer = sites.answer

    def larger(hospital: Hospital, message: Message) -> Message:
        request = envelopes.unpack_request(message.content).message
        if isinstance(request, PartRequest):
            return answer(hospital, message)
        content = envelopes.pack_reply(Reply(tensors={"x": torch.zeros(1100)}), Parts(tmp_path / "SOUTH", RUN).keep)
        signatures.sign_reply(content, hospital.identity, RUN, request.round, message.metadata.message_id)
        return Message(content, reply_to=message)

    sites.answer = larger  # type: ignore[method-assign]
    first, second = sites.ask()
    assert isinstance(first, Missing)
    assert isinstance(second, Reply)
    assert second.tensors["x"].shape == (1100,)


def test_no_work_is_given_out_after_the_deadline(parted: Any, tmp_path: Path) -> None:
    sites = InParts(tmp_path)
    sites.exchange.enrol(set_federation(parted, round_timeout_s=0.3))
    sites.order.clear()
    answer = sites.answer

    def slow(hospital: Hospital, message: Message) -> Message:
        time.sleep(0.11)
        return answer(hospital, message)

    sites.answer = slow  # type: ignore[method-assign]
    assert all(isinstance(outcome, Missing) and outcome.reason == "late" for outcome in sites.ask())
    assert "train.pretrain" not in sites.stages("NORTH") + sites.stages("SOUTH")
