"""How requests reach the sites over Flower's Grid, whichever engine it belongs to, and come back when they were lost.

A node's last activation tells a site that was started again (what it had in hand is lost, and it is asked again) from
one whose link was down (its reply is still to come).  Flower's own errors that say so much as "not there" are taken in
the same way, if the SuperLink says them itself: a site does not say of itself that it is gone.  Asked again too often
without an answer, it is given up; else only the round's deadline ends it.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from chexfound.contract.detached import Envelope
from chexfound.contract.limits import Limits
from chexfound.contract.request import PartRequest, Reply, Request
from chexfound.errors import ChexfoundError, CodeError, ConfigError, ProtocolError, RosterError, SiteError, VersionError
from chexfound.host.processes import trim
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes, error_replies, signatures
from server.exchange.flwr_private import node_key, of_superlink, pull_until
from server.exchange.protocol import Member, Missing, checked_roster
from server.exchange.transfer import Came, Download, Outgoing, Sent, Talk

LOST = (3, 4, 5)  # error codes of the SuperLink's own (wire.FLOWER_ERRORS), after which it helps to ask again
CRASHED = 8  # that of a site's node whose worker died, which is started again
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, DecodeError)  # of Flower, over what a site sent
PULLS_MAX = 8  # replies that are pulled side by side, each of a part at most
PAUSE_S = (0.02, 0.5)  # between two looks for replies: longer each time, in these bounds (of many sites, a longer one)
LOOK_S = 2.0  # between two looks at who is connected
GRACE_S = 60.0  # after the deadline that a reply which came in time is there, until those before it are dealt with
LAST_S = 5.0  # after the deadline that a reply which came in time may take to be pulled
AGAIN_MAX = 8  # times that a site is asked one thing again
AWAY_S = 30.0  # that a site is waited for which the last request has lost, and which has not come back since
Event = dict[str, Any]


@dataclass
class _Asked:
    """Hold what is under way to one site: a request, or one of the messages that it takes in parts."""

    index: int
    talk: Talk
    sent: Sent  # the present message
    parted: bool  # its tensors go in parts, or its reply may come so
    spool: Download | None
    outcome: Reply | Missing | None = None
    ids: list[str] = field(default_factory=list)  # of its messages, of which one may still be answered
    activated: str = ""  # of the node, when the last was sent
    lost: bool = False  # told to the run
    again: int = 0
    until: float = math.inf  # while it is lost (time.monotonic), if not to the deadline
    pulls: dict[str, Future[list[Message]]] = field(default_factory=dict)  # of replies that may be on their way

    @property
    def request(self) -> Request:
        """Give what the present message asks."""
        return self.sent.message

    def close(self) -> None:
        """Drop what its reply came in."""
        if self.spool is not None:
            self.spool.close()


class GridExchange:
    """Sites behind a Flower Grid.  Replies are pulled one at a time, in the order of the sites: one update is held.

    Those that come in parts are pulled from all sites at the same time, and put together on the disk.

    Args:
        sites: those of the federation, with the keys that replies are verified with; None: they have no keys.
        run_id: which the signatures are for.
        spool: folder where replies that come in parts are put together; None: each message is whole.
        on_event: told "policy", "wait", "asked", "replied", "refused", "lost" and "back".
    """

    def __init__(
        self,
        grid: Grid,
        *,
        sites: Roster | None = None,
        run_id: int = 0,
        spool: Path | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.grid, self.sites, self.run_id, self.spool = grid, sites, run_id, spool
        self._tell = on_event or (lambda event: None)
        self._names: list[str] = []
        self._nodes: list[int] = []  # 0: not connected yet
        self._recipe = Recipe()
        self._timeout_s = self._recipe.federation.round_timeout_s
        self._pulling = threading.BoundedSemaphore(PULLS_MAX)
        self._away: set[str] = set()  # sites that the last request to them has lost

    # -- who takes part

    def enrol(self, recipe: Recipe, before: Sequence[Member] = ()) -> list[Member]:
        """Wait for the sites and ask each who it is.

        Raises: SiteError if too few come in time, or one of them cannot take part and no quorum does without it.
        """
        self._recipe = recipe
        if self.spool is not None:
            shutil.rmtree(self.spool, ignore_errors=True)  # of a run that was killed
        names = [member.name for member in before]
        nodes = self._wait(names)
        self._names, self._nodes = [self._name_of(node) for node in nodes], [node.node_id for node in nodes]
        replies: list[Reply] = []
        senders: dict[str, int] = {}
        for node, reply in zip(nodes, self.ask([Request(phase="enrol") for _ in nodes]), strict=True):
            outcome = self._checked(node, reply) if isinstance(reply, Reply) else reply
            if isinstance(outcome, Reply):
                replies.append(outcome)
                senders[str(outcome.values.get("site"))] = node.node_id
            elif outcome is not None and recipe.federation.quorum_sites is None:
                raise outcome.error
        labels = [f"node {senders[str(reply.values.get('site'))]}" for reply in replies]
        members = {member.name: member for member in self._roster(replies, labels)}
        quorum = recipe.federation.quorum_sites
        if len(members) < ((before and quorum) or recipe.federation.min_sites):
            raise SiteError(f"only {len(members)} of {len(nodes)} sites can take part; the others' own logs say why")
        if before:  # others that have come since are not of this run; those that are away may come back
            members = {
                one.name: members.get(one.name, one) for one in before if one.name in members or quorum is not None
            }
        self._names = list(members)
        self._nodes = [senders.get(name, 0) for name in members]
        return list(members.values())

    def _checked(self, node: NodeInfo, reply: Reply) -> Reply | Missing:
        """An enrolment by itself: of several sites, one that cannot be is that site's fault alone."""
        try:
            if self.sites and "policy" in reply.values:
                limits = Limits.parse(reply.values["policy"], f"node {node.node_id}: its policy")
                self._tell({"event": "policy", "site": self._name_of(node), "limits": limits})
            self._roster([reply], [f"node {node.node_id}"])
        except ChexfoundError as error:
            name = self._name_of(node)
            self._tell({"event": "refused", "phase": "enrol", "round": 0, "site": name, "reason": error.code})
            return Missing(reason=error.code, error=error)
        return reply

    def _roster(self, replies: Sequence[Reply], senders: Sequence[str]) -> list[Member]:
        return checked_roster(replies, senders, self._recipe, len(self.sites.sites) if self.sites else None)

    def _name_of(self, node: NodeInfo) -> str:
        """Give what a node is called until it has said who it is, and by its key if it has one."""
        return self._keys().get(node_key(node), f"node {node.node_id}")  # as `flwr supernode list` shows them

    def _keys(self) -> dict[str, str]:
        return {keys.node: name for name, keys in self.sites.sites.items()} if self.sites else {}

    def _connected(self) -> dict[int, NodeInfo]:
        """Nodes by number; with keys only those of the federation's sites."""
        known = self._keys()
        nodes = sorted(self.grid.get_nodes(), key=lambda node: node.node_id)
        return {node.node_id: node for node in nodes if not self.sites or node_key(node) in known}

    def _wait(self, names: list[str]) -> list[NodeInfo]:
        config = self._recipe.federation
        deadline, seen = time.monotonic() + config.wait_s, -1
        while True:
            nodes = [*self._connected().values()]
            if names and self.sites:
                nodes = [node for node in nodes if self._name_of(node) in names]
            wanted = max(config.min_sites, len(names))
            if len(nodes) >= wanted:
                return nodes
            if len(nodes) != seen:
                self._tell({"event": "wait", "sites": len(nodes), "of": wanted})
            seen = len(nodes)
            if time.monotonic() > deadline:
                if names and config.quorum_sites is not None and seen >= config.quorum_sites:
                    return nodes
                raise SiteError(
                    f"only {seen} of {'the ' if names else 'federation.min_sites '}{wanted} sites connected within "
                    f"{config.wait_s:g} s; start the others, or lower federation.min_sites"
                )
            time.sleep(0.5)

    # -- a request to each, and what comes back

    def ask(
        self, requests: Sequence[Request | None], timeout_s: float | None = None
    ) -> Iterator[Reply | Missing | None]:
        """Send one request to each site; a site that is lost is asked again when it is back, until the deadline.

        Args:
            requests: by site; None: it is not asked.
            timeout_s: to it; the recipe's for a round, if not given.
        """
        self._timeout_s = timeout_s or self._recipe.federation.round_timeout_s
        deadline = time.monotonic() + self._timeout_s
        asked = self._talks(requests)
        if asked:
            names = [self._names[one.index] for one in asked]
            self._tell({"event": "asked", **_where(asked[0].request), "sites": names})
            nodes = self._connected()
            for one in asked:
                if self._names[one.index] in self._away and self._nodes[one.index] not in nodes:
                    one.until = time.monotonic() + AWAY_S
            self._push(asked, nodes, deadline)
        try:
            for request in requests:
                if request is None:
                    yield None
                    continue
                outcome = self._await(asked[0], asked, deadline)
                if isinstance(outcome, Reply):
                    self._tell({"event": "replied", **_where(request), "site": self._names[asked[0].index]})
                    self._away.discard(self._names[asked[0].index])
                asked[0].outcome = None
                yield outcome
                del outcome  # before the next one comes: of updates one is held
                asked.pop(0).close()
        finally:
            for one in asked:
                one.close()

    def _talks(self, requests: Sequence[Request | None]) -> list[_Asked]:
        """To whom a request goes, and with which first message; tensors that several are sent are laid out once."""
        part_bytes = int(self._recipe.federation.part_mb * 1e6)
        sent: dict[int, Outgoing] = {}
        asked = []
        for index, request in enumerate(requests):
            if request is None:
                continue
            if self.spool is None:
                talk, spool, parted = _single(request), None, False
            else:
                if id(request.tensors) not in sent:
                    sent[id(request.tensors)] = Outgoing(request.tensors)
                spool = Download(path=self.spool / f"{index:03d}", part_bytes=part_bytes)
                talk = spool.ask(request, sent[id(request.tensors)])
                parted = sent[id(request.tensors)].size > part_bytes / 2  # a reply is a little larger than its request
            asked.append(_Asked(index, talk, next(talk), parted, spool))
        return asked

    def _push(self, asked: Sequence[_Asked], nodes: dict[int, NodeInfo], deadline: float) -> None:
        there = [one for one in asked if self._nodes[one.index]]
        messages = [
            Message(
                content=content,
                dst_node_id=self._nodes[one.index],
                message_type=envelopes.MESSAGE_TYPES[one.request.kind],
                group_id=str(one.request.round + 1),  # only shown in the logs, where the first is 1
                ttl=max(deadline - time.monotonic(), 0.0) + GRACE_S,
            )
            for one, content in zip(there, envelopes.pack_requests([o.sent for o in there], self.sites), strict=True)
        ]
        ids = list(self.grid.push_messages(messages))
        if any(one.request.tensors or isinstance(one.request, PartRequest) for one in there):
            messages.clear()
            trim()
        for one, message_id in zip(there, ids + [""] * (len(there) - len(ids)), strict=True):
            node = nodes.get(self._nodes[one.index])
            one.activated = node.last_activated_at if node else one.activated
            if message_id:  # Flower puts none for a message that it could not hand on
                one.ids.append(message_id)

    def _await(self, one: _Asked, pending: Sequence[_Asked], deadline: float) -> Reply | Missing:
        pause, look_at = PAUSE_S[0], time.monotonic() + LOOK_S
        while one.outcome is None:
            moved = [self._move(other, deadline) for other in pending if other is one or other.parted]
            if one.outcome is not None:
                break
            if time.monotonic() >= (min(deadline, one.until) if one.lost else deadline):
                return self._overdue(one)  # looked for once all the same: one before it may have used up the time
            if any(moved):
                pause = PAUSE_S[0]
            if not one.ids and not self.sites:
                # A node without a key has another number when it comes back, and the run another site.
                text = f"{self._where(one)}: is no longer connected; start it again and resume the run"
                return Missing(reason="gone", error=SiteError(text))
            if time.monotonic() > look_at:
                self._look(pending, deadline)
                look_at = time.monotonic() + LOOK_S
            time.sleep(pause)
            looked = sum(other.parted for other in pending)
            pause = min(pause * 1.5, PAUSE_S[1] * max(1.0, looked / PULLS_MAX))
        return one.outcome

    def _overdue(self, one: _Asked) -> Missing:
        if one.lost:
            self._away.add(self._names[one.index])
            return Missing(reason="gone", error=SiteError(f"{self._where(one)}: was lost, and has not come back"))
        text = f"{self._where(one)}: no reply within {self._timeout_s:g} s"
        return self._missing(one, "late", SiteError(text))

    def _move(self, one: _Asked, deadline: float) -> bool:
        """Take what has come from a site, and send it the next message if there is one."""
        for message_id in list(one.ids):
            if one.outcome is not None or (outcome := self._pulled(one, message_id, deadline)) is None:
                continue
            one.outcome = self._next(one, outcome, deadline) if isinstance(outcome, Envelope) else outcome
            return True
        return False

    def _next(self, one: _Asked, reply: Came, deadline: float) -> Reply | Missing | None:
        """Give what a reply leads to: the end, or another message."""
        try:
            one.sent = one.talk.send(reply)
        except StopIteration as ended:
            whole: Reply = ended.value
            return whole
        except ProtocolError as error:
            return self._missing(one, error.code, ProtocolError(f"{self._where(one)}: {error}"))
        one.ids.clear()
        one.again = 0
        if time.monotonic() < deadline:  # else it is late, and would work for nothing
            self._push([one], self._connected(), deadline)
        return None

    def _pulled(self, one: _Asked, message_id: str, deadline: float) -> Came | Missing | None:
        """Give what came of a request.

        Flower raises what it likes over a reply whose parts are not what they say, and that is its sender's fault; and
        it would wait for two hours for a part that does not come.
        """
        try:
            messages = self._pull(one, message_id, deadline)
        except UNREADABLE as error:
            text = f"{self._where(one)}: a reply that cannot be read ({type(error).__name__})"
            return self._missing(one, ProtocolError.code, ProtocolError(text))
        if messages:
            trim()  # what its parts came in, before it is unpacked
        for message in messages:
            if (outcome := self._judged(one, message_id, message)) is not None:
                return outcome
        return None

    def _pull(self, one: _Asked, message_id: str, deadline: float) -> list[Message]:
        """The reply, once all of it is here: a pull waits for what is on its way, and other sites should not wait."""
        pull_until(deadline)
        if self.spool is None or getattr(self.grid, "works_when_pulled", False):
            return list(self.grid.pull_messages([message_id]))
        if message_id not in one.pulls:
            one.pulls[message_id] = self._begin_pull(message_id)
        pull = one.pulls[message_id]
        wait([pull], PAUSE_S[0] if time.monotonic() < deadline else LAST_S)  # it waits for no part any more then
        if not pull.done():
            return []
        del one.pulls[message_id]
        return pull.result()

    def _begin_pull(self, message_id: str) -> Future[list[Message]]:
        pull: Future[list[Message]] = Future()

        def work() -> None:
            with self._pulling:
                try:
                    pull.set_result(list(self.grid.pull_messages([message_id])))
                except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                    pull.set_exception(error)

        threading.Thread(target=work, daemon=True).start()  # one that still waits does not keep the process
        return pull

    def _look(self, pending: Sequence[_Asked], deadline: float) -> None:
        """Ask again who lost its request and is there."""
        nodes = self._connected()
        by_name = {self._name_of(node): number for number, node in nodes.items()} if self.sites else {}
        for one in pending:
            if one.outcome is not None:
                continue
            self._nodes[one.index] = self._nodes[one.index] or by_name.get(self._names[one.index], 0)
            node = nodes.get(self._nodes[one.index])
            if node is None:
                self._lose(one, "gone")
                continue
            if one.ids and node.last_activated_at == (one.activated or node.last_activated_at):
                one.activated = node.last_activated_at
                self._find(one)  # its reply is still to come
                continue
            self._lose(one, "gone")
            if one.again == AGAIN_MAX:
                self._away.add(self._names[one.index])
                text = f"{self._where(one)}: has lost what it was asked {1 + AGAIN_MAX} times; its own log says why"
                one.outcome = Missing(reason="gone", error=SiteError(text))
                continue
            one.again += 1
            self._push([one], nodes, deadline)
            self._find(one)

    def _lose(self, one: _Asked, reason: str) -> None:
        if not one.lost:
            self._tell({"event": "lost", **_where(one.request), "site": self._names[one.index], "reason": reason})
        one.lost = True

    def _find(self, one: _Asked) -> None:
        if one.lost:
            self._tell({"event": "back", **_where(one.request), "site": self._names[one.index]})
        one.lost, one.until = False, math.inf

    def _judged(self, one: _Asked, message_id: str, message: Message) -> Came | Missing | None:
        """The reply, or why it does not count; None if there may be another."""
        where = self._where(one)
        if message.has_error():
            kind = error_replies.unpack_error(message)
            if kind is ChexfoundError and message.error.code in LOST and not of_superlink(message):
                text = f"{where}: says what the SuperLink alone can know (Flower's error code {message.error.code:d})"
                return self._missing(one, ProtocolError.code, ProtocolError(text))
            if kind is ChexfoundError and message.error.code in (*LOST, CRASHED):
                one.ids.remove(message_id)
                if not one.ids:  # else it was asked again since, and this is of the time before
                    self._lose(one, "gone")
                return None
            text = f"{where}: {error_replies.explain_error(message)}; that site's own log says why"
            code = error_replies.error_code(message)
            if code == "secagg.plain":  # resumed, the run would fail again
                return self._missing(one, code, ConfigError(f"{text}. Begin another, with --set aggregation=secagg"))
            refused = issubclass(kind, CodeError | RosterError | VersionError)
            return self._missing(one, code, (kind if refused else SiteError)(text))
        try:
            if not message.has_content():
                raise ProtocolError("a reply without content")
            reply = envelopes.unpack_reply(message.content)
            self._verify(one, reply.message, message_id, message)
        except ProtocolError as error:
            return self._missing(one, error.code, ProtocolError(f"{where}: {error}"))
        return reply

    def _verify(self, one: _Asked, reply: Reply, message_id: str, message: Message) -> None:
        """Check that the site which was asked signed this reply; at enrolment, that it says its own name."""
        if self.sites is None:
            return
        name = self._names[one.index]
        key = signing.read_public_line(self.sites.sites[name].identity)
        signatures.verify_reply(message.content, key, self.run_id, one.request.round, message_id)
        if one.request.phase == "enrol" and reply.values.get("site") != name:
            raise ProtocolError("says another name than that of its keys")

    def _missing(self, one: _Asked, reason: str, error: ChexfoundError) -> Missing:
        if reason == "late":
            self._lose(one, reason)
        else:  # it has answered: that it does not do it, or what does not count
            self._tell({"event": "refused", **_where(one.request), "site": self._names[one.index], "reason": reason})
        return Missing(reason=reason, error=error)

    def _where(self, one: _Asked) -> str:
        name = self._names[one.index]
        where = f"{name if name.startswith('node ') else f'site {name!r}'} in {one.request.phase}"
        return where + (f", round {one.request.round + 1}" if one.request.steps else "")


def _single(request: Request) -> Talk:
    reply = yield Envelope(message=request)
    return reply.message


def _where(request: Request) -> Event:
    return {"phase": request.phase, "round": request.round}
