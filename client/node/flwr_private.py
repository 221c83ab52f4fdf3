"""Everything of the site that touches Flower's private API, so that a new minor version breaks one file loudly.

Flower's SuperNode runs as it is, but for what is put in front of its connection here: the bundle of code that a run
ships never reaches it.  It is hashed, and what the SuperNode gets to parse in its stead is a bundle of ours, which
holds no code.  A run that was refused is not dropped there (an exception would end the SuperNode) but handed on with
the reason, for the worker to answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE, SubStatus
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from chexfound.identity import bundle
from chexfound.identity.bundle import Bundle
from chexfound.parsing.names import shown

log = logging.getLogger("chexfound.client")
RUN_KEYS = ("recipe", "backbone", "run-dir", "submission")  # that a run's configuration may have, all texts
POLL_S = (0.2, 3.0)  # between two questions for messages: a twentieth of the time without one, in these bounds
RETRY_S = (0.05, 0.5)  # between two tries to pull an object: doubled each time, up to this
REPLY_POLL_S = 0.05  # between two looks for the worker's reply
SEND_AGAIN_S = 5.0  # before a reply that was not taken is sent again
ASK_S = 3.0  # between two questions whether the run of the message in hand still goes on


def release_bundle() -> Bundle:
    """The bundle that the installed release ships, built as `flwr run` builds it."""
    return bundle.read(build_fab_from_files(bundle.release_files())[0])


def retry_soon() -> None:
    """Ask again soon for an object that is not there yet: Flower waits 1 s, 2 s, 4 s … for what takes milliseconds.

    Without Flower's limit of tries, which would come too soon; that of two hours stays.
    """
    sooner = {"initial_backoff": RETRY_S[0], "backoff_cap": RETRY_S[1], "max_tries_per_object": None}
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__
        assert defaults is not None
        assert defaults.keys() >= sooner.keys()
        defaults.update(sooner)


# -- the SuperNode


class Told(Protocol):
    """Whoever follows what the SuperNode does."""

    def state(self, name: str, **about: Any) -> None:
        """It does this now: idle, receiving, working, sending."""

    def contact(self) -> None:
        """The coordinator answered."""

    def over(self) -> None:
        """Nobody waits any more for the reply to the message in hand."""


def run_supernode(arguments: Sequence[str], refusal: Callable[[bytes], str | None], told: Told) -> None:
    """Run `flower-supernode` with these arguments in this process; SIGTERM lets it finish what it has in hand.

    Args:
        arguments: its command line.
        refusal: of a bundle's bytes; None if the site's operator approved it, else why it may not run.
        told: learns what it does.
    """
    retry_soon()
    sys.argv = ["flower-supernode", *arguments]
    logging.getLogger("flwr").addFilter(_plain)
    connect, push = start_client_internal._init_connection, start_client_internal._push_messages

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        told.state("connecting")
        with connect(*args, **kwargs) as functions:
            told.contact()
            node = _Node(functions, refusal, told)
            signal.signal(signal.SIGTERM, node.drain)
            setattr(start_client_internal, "time", node)  # noqa: B010 (it uses time.sleep alone)
            start_client_internal._push_messages = node.pushing(push)
            yield node.functions

    start_client_internal._init_connection = watched
    flower_supernode()


def _plain(record: logging.LogRecord) -> bool:
    """Make a record of Flower's log printable, and let it pass: a newline from the coordinator would forge a line."""
    if not isinstance(record.msg, str):  # an exception
        record.msg = shown(record.msg)
    if isinstance(record.args, tuple):
        record.args = tuple(
            argument if isinstance(argument, int | float) else shown(argument) for argument in record.args
        )
    return True


class _Node:
    """Stand between the SuperNode's loop and the functions of its connection, in its main thread.

    Args:
        functions: of the connection, as `start_client_internal._init_connection` yields them.
        refusal: of a bundle's bytes.
        told: learns what is done.
    """

    def __init__(self, functions: tuple[Any, ...], refusal: Callable[[bytes], str | None], told: Told) -> None:
        node_id, self._receive, self._send, get_run, get_fab, pull_object, self._push, confirm = functions
        self._get_run = get_run
        self._confirm = _ending_the_message(confirm)
        admission = _Admission(get_run, get_fab, refusal, told)
        self.functions = (
            *(node_id, self.receive, self.send, admission.run, admission.fab),
            *(_ending_the_message(pull_object), self._push, self.confirm),
        )
        self._told, self._parent = told, os.getppid()
        self._draining = self._in_hand = False
        self._message = ""  # number of the one in hand, until its reply is sent
        self._until = math.inf  # when (time.time) the reply to it comes too late
        self._ended = _Ended(get_run, 0)
        self._over = False  # nobody waits for that
        self._busy = time.monotonic()

    def drain(self, *_: object) -> None:
        """SIGTERM came: leave, once the message in hand was answered, if there is one that somebody waits for."""
        self._draining = True
        orphan = os.getppid() != self._parent  # nobody is left who would end it in time
        if not self._in_hand or self._over or orphan:
            os.kill(os.getpid(), signal.SIGINT)  # Flower's own way to say goodbye

    def receive(self) -> Any:
        """The next message; the one before was answered, or given up."""
        self._in_hand = False
        if self._draining:
            self.drain()
        self._told.state("idle")
        if (got := self._receive()) is not None and not _answerable(*got):
            log.warning("event=dropped reason='a message without its own number, or one that is a reply'")
            got = None
        if got is not None:
            self._in_hand, self._busy, self._over = True, time.monotonic(), False
            about = got[0].metadata
            self._message, self._until = about.message_id, about.created_at + about.ttl
            self._ended = _Ended(self._get_run, about.run_id)
            self._told.state("receiving", run=str(about.run_id), phase=about.message_type, round=about.group_id)
        self._told.contact()
        return got

    def confirm(self, run_id: int, object_id: str) -> None:
        """All of the message is here; the worker may have it."""
        self._confirm(run_id, object_id)
        self._told.state("working")

    def send(self, reply: Message, objects: ObjectTree, seconds: float) -> tuple[set[str], str]:
        """The worker's reply with all of its objects, so that nothing is left for Flower to push.

        Flower tries once, and drops the reply.  The coordinator would wait for it until the round's deadline: the
        connection is the old one, and so the message is not sent anew.  It refuses the objects of a reply that it was
        not sent more of for three minutes, and forgets the reply.
        """
        self._told.state("sending")
        self._busy = time.monotonic()
        if reply.metadata.reply_to_message_id == self._message:
            self._message = ""
        until = reply.metadata.created_at + reply.metadata.ttl
        while True:
            missing, session = _patiently(self._send, until)(reply, objects, seconds)
            push = partial(_patiently(self._push, until), reply.metadata.run_id, session)
            try:
                inflatable_utils.push_object_contents_from_iterable(self._contents(objects, missing), push)
            except inflatable_utils.ObjectPushError:
                if time.time() > until:
                    raise
                log.warning("event=send-again reason='the coordinator did not take all of the reply'")
                time.sleep(SEND_AGAIN_S)
            else:
                return set(), session

    def _contents(self, objects: ObjectTree, missing: set[str]) -> Iterator[tuple[str, bytes]]:
        for number in dict.fromkeys(part.object_id for part in iterate_object_tree(objects)):
            if number in missing:
                while (content := self._objects.get(number)) == b"":  # the worker is still handing it over
                    time.sleep(REPLY_POLL_S)
                assert content is not None
                yield number, content

    def pushing(self, push: Callable[..., None]) -> Callable[..., None]:
        """Flower's wait for a reply, until it is that to the message in hand.

        The worker may have begun with a message that was dropped then, and its reply would be taken for the next one's;
        from then on each reply would be sent only when another message comes.
        """

        def until_answered(*, object_store: ObjectStore, **about: Any) -> None:
            self._objects = object_store
            push(object_store=object_store, **about)
            while self._message:
                push(object_store=object_store, **about)

        return until_answered

    def sleep(self, seconds: float) -> None:
        """In place of Flower's polls, which are 3 s for a message and 0.5 s for the worker's reply."""
        if self._message and not self._over and (time.time() > self._until or self._ended.look()):
            log.info("event=over reason='the run has ended, or the reply comes too late'")
            self._over = True
            self._told.over()
            if self._draining:
                self.drain()
        if self._draining:
            self._told.state("draining")
        idle = (time.monotonic() - self._busy) / 20
        time.sleep(REPLY_POLL_S if seconds < 1 else min(max(idle, POLL_S[0]), POLL_S[1]))


class _Ended:
    """Whether a run has ended, asked now and then, beside all else: while its SuperLink is away there is no answer.

    Args:
        get_run: of the connection.
        run_id: of the run.
    """

    def __init__(self, get_run: Callable[[int], Run], run_id: int) -> None:
        self._get_run, self._run_id = get_run, run_id
        self._ended, self._again = False, time.monotonic() + ASK_S
        self._asking: threading.Thread | None = None

    def look(self) -> bool:
        """Give what is known by now."""
        if time.monotonic() >= self._again and (self._asking is None or not self._asking.is_alive()):
            self._again = time.monotonic() + ASK_S
            self._asking = threading.Thread(target=self._ask, daemon=True)
            self._asking.start()
        return self._ended

    def _ask(self) -> None:
        try:
            self._get_run(self._run_id)
        except RunNotRunningException:
            self._ended = True
        except Exception as error:  # noqa: BLE001 (whatever the connection raises: it is asked again)
            log.debug("event=unanswered reason=%r", type(error).__name__)


def _ending_the_message(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make Flower drop the message and its task, of a run that was stopped as its message came in.

    It does so for any Exception; for its own RunNotRunningException, which is none, it leaves both with the worker.
    """

    def called(*args: Any) -> Any:
        try:
            return function(*args)
        except RunNotRunningException as error:
            raise RuntimeError("the run was stopped") from error

    return called


def _patiently(function: Callable[..., Any], until: float) -> Callable[..., Any]:
    """Have a function of the connection try again until `until` (time.time): also where Flower's own patience ends.

    Flower takes a connection that broke in the TLS handshake for one with a wrong certificate.
    """

    def called(*args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 500
                if status < 500 or time.time() > until:
                    raise
                log.warning("event=send-again reason=%r", type(error).__name__)
                time.sleep(SEND_AGAIN_S)

    return called


def _answerable(message: Message, objects: ObjectTree) -> bool:
    """Whether Flower will hand a message to the worker under its number.

    It would keep waiting for the reply to one that it will not; and take a "reply" that came in for the worker's.
    """
    about = message.metadata
    return bool(about.message_id) and about.message_id == objects.object_id and not about.reply_to_message_id


class _Admission:
    """Admit a run: hold what the SuperNode is given of its configuration and of its bundle."""

    def __init__(
        self,
        get_run: Callable[[int], Run],
        get_fab: Callable[[str, int], Fab],
        refusal: Callable[[bytes], str | None],
        told: Told,
    ) -> None:
        self._get_run, self._get_fab, self._refusal, self._told = get_run, get_fab, refusal, told
        self._fabs: dict[int, Fab] = {}

    def run(self, run_id: int) -> Run:
        run = self._get_run(run_id)
        asked = run.override_config
        given: UserConfig = {key: value for key, value in asked.items() if key in RUN_KEYS and type(value) is str}
        if given != asked or run.primary_task_type == TaskType.AGENT_APP:
            refused: str | None = "the run's configuration holds what this release does not know"
        else:
            refused = self._refusal(self._get_fab(run.fab_hash, run_id).content)
        self._told.state("receiving", refused=refused)
        content = stand_in(refused or "")
        self._fabs[run_id] = Fab(hashlib.sha256(content).hexdigest(), content, {})
        # A task of any other type would never be taken by the worker, and the SuperNode would wait for ever.
        # Flower keeps the configuration, and with it a refusal, by the series that the coordinator names.
        return dataclasses.replace(
            run,
            run_id=run_id,
            series_id=run_id,
            override_config=given,
            fab_hash=self._fabs[run_id].hash_str,
            primary_task_type=TaskType.SERVER_APP,
        )

    def fab(self, fab_hash: str, run_id: int) -> Fab:
        return self._fabs.pop(run_id)


def stand_in(refused: str) -> bytes:
    """A bundle without code, in place of the one that came; its configuration says why that was refused, if it was."""
    reason = "".join(sign if " " <= sign <= "~" else "?" for sign in refused)  # what JSON and TOML write alike
    config = dict.fromkeys(RUN_KEYS, "") | {"refused": reason}
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    text = "\n".join(
        [
            "[project]",
            'name = "federated-chexfound"',
            'version = "0"',
            "[tool.flwr.app]",
            'publisher = "site"',
            "[tool.flwr.app.components]",
            'serverapp = "none:none"',
            'clientapp = "none:none"',
            "[tool.flwr.app.config]",
            *lines,
        ]
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", text)
    return buffer.getvalue()


# -- its worker


class Tasks:
    """Hold what the SuperNode of this machine has for its worker.

    Args:
        address: HOST:PORT of its runtime API, on loopback.
        secret: file of the secret that the two share.
    """

    def __init__(self, address: str, secret: Path) -> None:
        retry_soon()
        self.address = address
        shared = load_superexec_auth_secret(secret_file=str(secret)) or b""
        auth = SuperExecAuthHttpInterceptor(
            master_secret=shared, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._client = self._connect(RuntimeVersionHttpInterceptor(component_name="SuperExec"), auth)

    def _connect(self, *interceptors: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address, insecure=True, root_certificates=None, interceptors=list(interceptors)
        )

    def take(self) -> str | None:
        """The token of a message that waits; None if there is none, or no SuperNode."""
        try:
            got = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.TransportError:
            return None
        return got.token or None

    def answer(self, token: str, handle: Callable[[Message, Context], Message]) -> None:
        """Have a message handled, and hand the reply over.

        Raises: httpx.HTTPError if the SuperNode is gone; nobody waits for the reply then.
        """
        client = self._connect(
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)
        )
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        try:
            message, context, _, _ = pull_task_input(client)
            push_message(client, handle(message, context), context)
            push_task_output(client, context, SubStatus.COMPLETED, "")
        finally:
            heartbeat.stop()
            client.close()


# -- the preflight


def clock_tolerance() -> tuple[float, float]:
    """By how many seconds a node's clock may be behind the SuperLink's, and ahead of it, for its signature to be taken.

    As flwr.superlink.routers.fleet.node_auth compares them.
    """
    return TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE


def registered(address: str, authority: bytes, private: ec.EllipticCurvePrivateKey) -> bool:
    """Whether the SuperLink knows a node's key; asked so that nothing changes there, for a running node either.

    It is asked to take the node in with an interval of heartbeats that is out of bounds.  It looks the key up first,
    and refuses either way: with another code.

    Raises: httpx.HTTPError if it does not answer, or so as it does to no node.
    """
    signer = NodeAuthHttpInterceptor(private, private.public_key())
    request = ActivateNodeRequest(public_key=public_key_to_bytes(private.public_key()), heartbeat_interval=0)
    with FleetHttpClient.from_server_address(address, False, authority, [signer]) as client:
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            answer = FlowerError.from_json(error.response.text)
            if answer is None or answer.code not in _KNOWN:
                raise
            return _KNOWN[answer.code]
    raise httpx.DecodingError("the SuperLink takes a node in that asks for no heartbeats")


_KNOWN = {
    int(ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL): True,
    int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED): False,
}


def stray_object(size: int, private: ec.EllipticCurvePrivateKey) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of an upload of random bytes, signed by the node's key, as the guard asks for.

    It names no node, so the SuperLink reads it and then refuses it with 401: nothing is stored.
    """
    message, path = PushObjectRequest(object_content=os.urandom(size)), "/v1/fleet/push-object"
    body, kind = message.SerializeToString(), {"content-type": PROTOBUF_MEDIA_TYPE}
    request = httpx.Request("POST", f"https://coordinator{path}", content=body, headers=kind)
    signer = NodeAuthHttpInterceptor(private, private.public_key())
    signer.intercept(ProtobufRequestContext("", message, request), lambda _: httpx.Response(200))
    return path, body, {name: request.headers[name] for name in request.headers if name != "host"}
