"""How requests reach the sites: over Flower's Grid, or by a call (the simulation's lone sites)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from chexfound import phases, wire
from chexfound.errors import ConfigError, ProtocolError, SiteError
from chexfound.phases import Reply, Request
from chexfound.schema import Recipe

COUNTS = ("images", "patients", "train", "val", "test")
ENROLMENT = {"site", *COUNTS, "findings", "versions", "store_sha256"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as the roster has it: its name, and what it said of itself when it enrolled."""

    name: str
    values: dict[str, Any]


class Exchange(Protocol):
    """What a run needs of its sites."""

    def enrol(self, recipe: Recipe) -> list[Member]:
        """The roster: all sites, sorted by name."""

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Send one request to each site of the roster; replies in roster order, one at a time."""


def checked_roster(replies: Sequence[Reply], senders: Sequence[str]) -> list[Member]:
    """Sort the enrolled by name; `senders` is what they are called until they have one.

    Raises: ProtocolError for a reply that is not an enrolment; ConfigError for a name taken twice.
    """
    members = [_checked_member(reply.values, sender) for reply, sender in zip(replies, senders, strict=True)]
    members.sort(key=lambda member: member.name)
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two sites call themselves {twice[0]!r}; give each its own --name")
    return members


def _checked_member(values: dict[str, Any], sender: str) -> Member:
    name, findings, built = values.get("site"), values.get("findings"), values.get("versions")
    if not isinstance(name, str) or not wire.word(name):
        raise ProtocolError(f"{sender} enrolled without a usable name")
    if set(values) != ENROLMENT or not all(wire.count(values[key]) for key in COUNTS):
        raise ProtocolError(f"site {name!r} enrolled without its counts")
    images, patients, train, val, test = (values[key] for key in COUNTS)
    if train + val + test != images or patients > images:
        raise ProtocolError(
            f"site {name!r} enrolled without counts that add up: {images} images of {patients} patients, "
            f"{train} + {val} + {test} for training, validation and test"
        )
    if not isinstance(findings, dict) or not all(
        wire.word(finding)
        and isinstance(both, dict)
        and set(both) == {"positives", "negatives"}
        and all(wire.count(number) for number in both.values())
        and 0 < sum(both.values()) <= train
        for finding, both in findings.items()
    ):
        raise ProtocolError(f"site {name!r} enrolled without usable counts of its findings")
    if not isinstance(built, dict) or not all(wire.word(part) for pair in built.items() for part in pair):
        raise ProtocolError(f"site {name!r} enrolled without its versions")
    if not isinstance(values["store_sha256"], str) or not re.fullmatch("[0-9a-f]{64}", values["store_sha256"]):
        raise ProtocolError(f"site {name!r} enrolled without its store's hash")
    return Member(name=name, values=values)


class GridExchange:
    """Sites behind a Flower Grid, whichever engine it belongs to.

    Replies are pulled one id at a time, in roster order, so that no more than one update is held.
    """

    def __init__(self, grid: Grid, on_wait: Callable[[int, int], None] | None = None) -> None:
        self.grid = grid
        self.on_wait = on_wait
        self._nodes: list[int] = []
        self._names: list[str] = []
        self._timeout_s = 3600.0

    def enrol(self, recipe: Recipe) -> list[Member]:
        """Wait for the recipe's `min_sites` nodes and ask each who it is.

        Raises: SiteError if they do not come in time.
        """
        self._timeout_s = recipe.federation.round_timeout_s
        nodes = self._wait(recipe.federation.min_sites, recipe.federation.wait_s)
        self._nodes, self._names = nodes, [f"node {node}" for node in nodes]  # as `flwr supernode list` shows them
        replies = list(self.ask([Request(phase="enrol") for _ in nodes]))
        roster = checked_roster(replies, self._names)
        node_of = {reply.values["site"]: node for reply, node in zip(replies, nodes, strict=True)}
        self._names = [f"site {member.name!r}" for member in roster]
        self._nodes = [node_of[member.name] for member in roster]
        return roster

    def _wait(self, minimum: int, wait_s: float) -> list[int]:
        deadline = time.monotonic() + wait_s
        seen = -1
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= minimum:
                return nodes
            if len(nodes) != seen and self.on_wait is not None:
                self.on_wait(len(nodes), minimum)
            seen = len(nodes)
            if time.monotonic() > deadline:
                raise SiteError(
                    f"only {seen} of federation.min_sites {minimum} sites connected within {wait_s:g} s; "
                    "start the others, or lower federation.min_sites"
                )
            time.sleep(0.5)

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Send one request to each site; yield the replies in roster order.

        Raises: SiteError naming the site that failed, is gone, or is late.
        """
        messages = [
            Message(
                content=wire.pack_request(request),
                dst_node_id=node,
                message_type=wire.MESSAGE_TYPES[request.phase],
                group_id=str(request.round + 1),  # only shown in the logs, where the first is 1
                ttl=self._timeout_s,
            )
            for request, node in zip(requests, self._nodes, strict=True)
        ]
        ids = list(self.grid.push_messages(messages))
        del messages
        deadline = time.monotonic() + self._timeout_s
        if len(ids) != len(requests) or not all(ids):  # Flower puts None for a message that it could not hand on
            raise SiteError(f"{requests[0].phase}: a site is no longer connected; start it again and resume the run")
        for message_id, name, request in zip(ids, self._names, requests, strict=True):
            message = self._pull(message_id, deadline)
            where = f"{name} in {request.phase}"
            if request.steps:
                where += f", round {request.round + 1}"
            if message is None:
                raise SiteError(f"{where}: no reply within federation.round_timeout_s {self._timeout_s:g} s")
            if message.has_error():
                raise SiteError(f"{where}: {wire.explain_error(message)}; that site's own log says why")
            try:
                reply = wire.unpack_reply(message.content)
            except ProtocolError as error:
                raise ProtocolError(f"{where}: {error}") from error
            yield reply

    def _pull(self, message_id: str, deadline: float) -> Message | None:
        pause = 0.02
        while time.monotonic() < deadline:
            for message in self.grid.pull_messages([message_id]):
                return message
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)
        return None


class DirectExchange:
    """One site in this process, asked by a plain call: the pooled data, or a site alone."""

    def __init__(self, site: phases.Site) -> None:
        self.site = site
        self._recipe: Recipe | None = None

    def enrol(self, recipe: Recipe) -> list[Member]:
        """A roster of one."""
        self._recipe = recipe
        return checked_roster([phases.run(self.site, recipe, Request(phase="enrol"))], [f"site {self.site.name!r}"])

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Do what is asked, here and now."""
        assert self._recipe is not None
        for request in requests:
            yield phases.run(self.site, self._recipe, request)
