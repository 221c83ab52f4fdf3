"""The public door of a federation: what a SuperNode needs of the SuperLink, and nothing else.

Flower's SuperLink serves sites, operators and its own processes on one port.  With TLS and node
authentication on, whoever reaches that port may still submit code to all sites (`/v1/control/*`) or take
a run's work (`/v1/runtime/*`).  So the SuperLink listens on loopback, and this listens outside: it passes on
POST to the paths of the Fleet API, byte for byte as they are written here, and GET and HEAD to /health, to which
it adds the coordinator's versions.
Anything else is a 404, whoever asks: what may be done is a matter of the listener, not of the peer's address,
which is everybody's behind a proxy.

A request to the Fleet API is passed on only if its headers are signed by a site of the roster
(`server/services/proof.py`).  That is checked before anything of its body is read; Flower itself reads a body, whatever
its size, before it looks who sends it.  Control messages are small and are read whole here; an object is streamed, so
that the memory does not depend on its size.  A body has to come at a least rate.  Connections have their places by peer
(`server/services/places.py`).
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chexfound import __version__
from server.services import places, proof
from server.services.places import Places
from server.services.proof import NoProof, Proof, UnknownKey

log = logging.getLogger("chexfound.guard")

FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    )
)
HEALTH_PATH = b"/health"
VERSIONS = [(b"chexfound-version", __version__.encode()), (b"flower-version", metadata.version("flwr").encode())]
OBJECT_PATH = b"/v1/fleet/push-object"  # the one that carries what is large
ACTIVATE_PATH = b"/v1/fleet/activate-node"
OBJECT_MAX = 8 * 2**20  # bytes of its body; Flower cuts what is large into objects of 5 MiB
CONTROL_MAX = 64 * 2**10  # of every other body; the largest honest one, a reply of 1 GB announced, has 15 kB
PIECE = 2**20  # bytes of an object that are passed on together
GRACE_S, LEAST_BYTES_S = (
    60.0,
    4000.0,
)  # that a body may be waited for in all: so long, and longer by what has come of it
BODY_S = 900.0  # and no longer than that
SILENCE_S = 180.0  # in which nothing comes of the SuperLink's answer, or a peer takes nothing of it
ALIVE_S = 10.0  # in which the SuperLink answers /health
HEADERS_BYTES = 16 * 2**10  # of a request; Flower's have 1 kB
HEADERS_S = places.HEADERS_S  # in which a request that has begun on a connection is there, with its headers
BACKLOG = 256  # connections that wait to be accepted
HOP_BY_HOP = frozenset(
    b"connection expect host keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
_Health = tuple[int, Headers, bytes]

AWAY = b'{"detail":"the SuperLink does not answer"}'


class _Cut(Exception):
    """A request that is not read to its end: the status that its peer is told; 0 if that hung up."""


class Guard:
    """An ASGI application before a SuperLink.

    Args:
        superlink: its URL, for example https://127.0.0.1:8001.
        verify: how its certificate is checked; False for one without TLS.
        proof: knows the sites.
        places: of the connections.
    """

    def __init__(self, superlink: str, verify: ssl.SSLContext | bool, proof: Proof, places: Places) -> None:
        self._proof, self._places = proof, places
        self._alive: dict[str, asyncio.Task[_Health]] = {}
        self._client = httpx.AsyncClient(
            base_url=superlink,
            verify=verify,
            trust_env=False,  # no proxy between us and our own machine
            timeout=httpx.Timeout(SILENCE_S, connect=10.0, pool=None),
            limits=httpx.Limits(  # an idle one is closed before the SuperLink does, after 5 s
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0
            ),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        else:
            self._places.asks(scope["client"])
            if not may_pass(scope["method"], scope["raw_path"], scope["query_string"]):
                await self._refuse(scope, send, 404, "no path of the Fleet API")
            elif scope["raw_path"] == HEALTH_PATH:
                await self._tell_health(scope, send)
            else:
                await self._admit(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _refuse(self, scope: Scope, send: Send, status: int, why: str, body: bytes | None = None) -> None:
        log.warning(
            "event=refused status=%d peer=%s method=%r path=%r reason=%r",
            status, scope["client"][0], scope["method"], scope["raw_path"][:200], why,
        )  # fmt: skip
        await _answer(send, status, body)
        self._places.dismiss(scope["client"])

    async def _tell_health(self, scope: Scope, send: Send) -> None:
        """Without a body, of which none is read; one question to the SuperLink answers all who ask meanwhile."""
        if _length(scope["headers"]) != 0:
            await self._refuse(scope, send, 400, "a body")
            return
        method = scope["method"]
        if method not in self._alive:
            self._alive[method] = asyncio.create_task(self._ask_health(method))
        status, headers, body = await asyncio.shield(self._alive[method])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _ask_health(self, method: str) -> _Health:
        try:
            response = await self._client.request(method, HEALTH_PATH.decode(), timeout=ALIVE_S)
        except httpx.TransportError as error:
            log.warning("event=superlink-unreachable path=%s error=%s", HEALTH_PATH.decode(), type(error).__name__)
            return 503, _headers(AWAY), AWAY
        finally:
            del self._alive[method]
        return response.status_code, [*_kept(response.headers.raw), *VERSIONS], response.content

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["raw_path"], scope["headers"]
        limit = OBJECT_MAX if path == OBJECT_PATH else CONTROL_MAX
        length = _length(headers)
        try:
            site = self._proof.site(headers)
        except UnknownKey as error:
            # A node that wants to connect is told in Flower's words; any other 401 ends it without any.
            status, body = proof.NOT_REGISTERED if path == ACTIVATE_PATH else (401, None)
            await self._refuse(scope, send, status, str(error), body)
        except NoProof as error:
            await self._refuse(scope, send, 401, str(error))
        else:
            if not self._places.prove(scope["client"], site):
                await self._refuse(scope, send, 503, f"{site} has all of its {places.SITE_MAX} connections")
            elif length is not None and length > limit:
                await self._refuse(scope, send, 413, f"{site} announces {length} bytes")
            else:
                await self._forward(scope, _body(receive, limit), send)

    async def _forward(self, scope: Scope, body: AsyncIterator[bytes], send: Send) -> None:
        begun = False
        try:
            whole = body if scope["raw_path"] == OBJECT_PATH else b"".join([part async for part in body])
            request = self._client.build_request(
                "POST", scope["raw_path"].decode("ascii"), headers=_kept(scope["headers"]), content=whole
            )
            response = await self._client.send(request, stream=True)
            try:
                await send(
                    {
                        "type": "http.response.start",
                        "status": response.status_code,
                        "headers": _kept(response.headers.raw),
                    }
                )
                begun = True
                async for part in response.aiter_raw():
                    async with asyncio.timeout(SILENCE_S):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            finally:
                await response.aclose()
            await send({"type": "http.response.body", "body": b""})
        except _Cut as error:
            if (status := error.args[0]) and not begun:
                await self._refuse(scope, send, status, "a body too large" if status == 413 else "a body too slow")
        except TimeoutError:
            self._places.dismiss(scope["client"])
        except httpx.TransportError as error:
            log.warning("event=superlink-unreachable path=%s error=%s", scope["path"], type(error).__name__)
            if begun:
                raise  # the answer breaks off, which its reader sees
            await _answer(send, 503, AWAY)


def may_pass(method: str, raw_path: bytes, query: bytes) -> bool:
    """Whether a request is one that a SuperNode makes; its path is compared as it was sent, undecoded."""
    if query:
        return False
    if method == "POST":
        return raw_path in FLEET_PATHS
    return method in ("GET", "HEAD") and raw_path == HEALTH_PATH


def _kept(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Without those of one connection, and those that it names, and without a length that chunks overrule."""
    named = {
        part.strip().lower() for name, value in headers if name.lower() == b"connection" for part in value.split(b",")
    }
    dropped = HOP_BY_HOP | named
    if any(name.lower() == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _length(headers: Headers) -> int | None:
    """Bytes of a request's body, as its headers announce it; None if they do not say."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return None
    return next((int(value) for name, value in headers if name == b"content-length"), 0)


async def _body(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """The parts of a body as they come, but not smaller than need be: each costs as much, here and in the SuperLink.

    Raises: _Cut if it is larger than the limit, or does not come fast enough; what it waits for us does not count.
    """
    clock = asyncio.get_running_loop().time
    size, waited, more, held = 0, 0.0, True, bytearray()
    while more:
        start = clock()
        try:
            async with asyncio.timeout(min(GRACE_S + size / LEAST_BYTES_S, BODY_S) - waited):
                event = await receive()
        except TimeoutError as error:
            raise _Cut(408) from error
        waited += clock() - start
        if event["type"] == "http.disconnect":
            raise _Cut(0)
        held += event.get("body", b"")
        size += len(event.get("body", b""))
        if size > limit:
            raise _Cut(413)
        more = event.get("more_body", False)
        if len(held) >= PIECE or (held and not more):
            yield bytes(held)
            held.clear()


class _Prompt(H11Protocol):
    """uvicorn's, but a peer that has begun another request on its connection does not take for ever to make it."""

    _waiting: asyncio.TimerHandle | None = None

    def on_response_complete(self) -> None:
        """The next one is waited for, of which a part may be here."""
        answered = self.cycle
        super().on_response_complete()
        self._wait_no_more()
        if not self.transport.is_closing():
            self._waiting = self.loop.call_later(HEADERS_S, self._give_up, answered)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for, which would keep the connection's half MB in memory."""
        super().connection_lost(exc)
        self._wait_no_more()

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.abort()


async def _answer(send: Send, status: int, body: bytes | None = None) -> None:
    """Answer, and read nothing more of the connection."""
    if body is None:
        body = b'{"detail":"%s"}' % HTTPStatus(status).phrase.encode()
    await send(
        {"type": "http.response.start", "status": status, "headers": [*_headers(body), (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]


class _Server(uvicorn.Server):
    """uvicorn's, but each connection has its place before TLS."""

    def __init__(self, config: uvicorn.Config, places: Places) -> None:
        super().__init__(config)
        self._places = places
        self._tasks: set[asyncio.Task[None]] = set()
        self._bound: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        _allow_files()
        self._bound = [] if sockets else [self.config.bind_socket()]
        for listener in sockets or self._bound:
            listener.setblocking(False)
            listener.listen(BACKLOG)
            self._begin(self._accept(listener))
        await super().startup([])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and wait for what is under way."""
        for task in self._tasks:
            task.cancel()
        await super().shutdown([*(sockets or []), *self._bound])

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                log.error("event=not-accepted reason=%r", error.strerror)
                await asyncio.sleep(1.0)
            else:
                self._begin(self._shake_hands(places.HeldPlace(accepted, address[:2], self._places)))

    async def _shake_hands(self, held: places.HeldPlace) -> None:
        limit = {"ssl_handshake_timeout": HEADERS_S} if self.config.ssl else {}
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(self._protocol, held, ssl=self.config.ssl, **limit)
        except OSError:  # no TLS, or not in time
            held.close()

    def _protocol(self) -> asyncio.Protocol:
        return _Prompt(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _allow_files() -> None:
    """Allow as many open files as this account may have: each connection takes up to two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def server(
    host: str,
    port: int,
    superlink: str,
    roster: Path,
    *,
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
) -> uvicorn.Server:
    """A server of the guard; `run()` serves until SIGTERM or Ctrl-C.

    Args:
        host: where it listens; "0.0.0.0" and "::" are all addresses of the machine.
        port: where it listens.
        superlink: host:port of the SuperLink, on loopback.
        roster: file of the sites that may pass, read again when it changes.
        ca: PEM file of the federation's certificate authority; without one, the SuperLink is asked without TLS.
        certificate: PEM file that is shown to sites; without one, they connect without TLS.
        key: PEM file of its private key.

    Raises: OSError or ssl.SSLError for a file that cannot be used; ConfigError for a roster that is none.
    """
    verify = ssl.create_default_context(cafile=ca) if ca else False
    held = Places()
    config = uvicorn.Config(
        Guard(f"{'https' if ca else 'http'}://{superlink}", verify, Proof(roster), held),
        host=host,
        port=port,
        http=_Prompt,
        ws="none",
        lifespan="on",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        server_header=False,
        proxy_headers=False,  # a peer's word on where it comes from is not taken
        access_log=False,
        log_config=None,
        h11_max_incomplete_event_size=HEADERS_BYTES,
        timeout_graceful_shutdown=10,
    )
    return _Server(config, held)
