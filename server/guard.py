"""The public door of a federation: what a SuperNode needs of the SuperLink, and nothing else.

Flower's SuperLink serves sites, operators and its own processes on one port.  With TLS and node
authentication on, whoever reaches that port may still submit code to all sites (`/v1/control/*`) or take
a run's work (`/v1/runtime/*`).  So the SuperLink listens on loopback, and this listens outside: it passes on
POST to the paths of the Fleet API, byte for byte as they are written here, and GET and HEAD to /health, to which
it adds the coordinator's versions.
Anything else is a 404, whoever asks: what may be done is a matter of the listener, not of the peer's address,
which is everybody's behind a proxy.

Bodies are streamed both ways, so that the memory does not depend on their size.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from importlib import metadata
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chexfound import __version__

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
BODY_MAX = 64 * 2**20  # bytes; Flower cuts what is large into objects of 5 MB
CONNECTIONS_MAX = 2048  # at once: 128 sites, each with its objects in flight
SILENCE_S = 180.0  # in which nothing comes of the SuperLink's answer, as Flower's own limit for an object
HEADERS_S = 30.0  # in which a request has to be there, with its headers, on a connection that is open
HOP_BY_HOP = frozenset(
    b"connection expect host keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class _Gone(Exception):
    """The peer hung up, or sends more than it may."""


class Guard:
    """An ASGI application before a SuperLink.

    Args:
        superlink: its URL, for example https://127.0.0.1:8001.
        verify: how its certificate is checked; False for one without TLS.
    """

    def __init__(self, superlink: str, verify: ssl.SSLContext | bool) -> None:
        self._client = httpx.AsyncClient(
            base_url=superlink,
            verify=verify,
            trust_env=False,  # no proxy between us and our own machine
            timeout=httpx.Timeout(SILENCE_S, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif may_pass(scope["method"], scope["raw_path"], scope["query_string"]):
            await self._forward(scope, receive, send)
        else:
            log.warning("event=refused method=%r path=%r", scope["method"], scope["raw_path"][:200])
            await _answer(send, 404, b'{"detail":"Not Found"}')

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _body(receive) if scope["method"] == "POST" else None
        request = self._client.build_request(
            scope["method"], scope["raw_path"].decode("ascii"), headers=_kept(scope["headers"]), content=body
        )
        begun = False
        try:
            response = await self._client.send(request, stream=True)
            try:
                headers = [*_kept(response.headers.raw), *(VERSIONS if scope["raw_path"] == HEALTH_PATH else [])]
                await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
                begun = True
                async for part in response.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            finally:
                await response.aclose()
            await send({"type": "http.response.body", "body": b""})
        except _Gone as error:
            if error.args:
                await _answer(send, 413, b'{"detail":"Content Too Large"}')
        except httpx.TransportError as error:
            log.warning("event=superlink-unreachable path=%s error=%s", scope["path"], type(error).__name__)
            if begun:
                raise  # the answer breaks off, which its reader sees
            await _answer(send, 503, b'{"detail":"the SuperLink does not answer"}')


def may_pass(method: str, raw_path: bytes, query: bytes) -> bool:
    """Whether a request is one that a SuperNode makes; its path is compared as it was sent, undecoded."""
    if query:
        return False
    if method == "POST":
        return raw_path in FLEET_PATHS
    return method in ("GET", "HEAD") and raw_path == HEALTH_PATH


def _kept(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without those of one connection, and those that it names, and without a length that chunks overrule."""
    named = {
        part.strip().lower() for name, value in headers if name.lower() == b"connection" for part in value.split(b",")
    }
    dropped = HOP_BY_HOP | named
    if any(name.lower() == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    size, more = 0, True
    while more:
        try:
            event = await asyncio.wait_for(receive(), SILENCE_S)
        except TimeoutError as error:
            raise _Gone from error
        if event["type"] == "http.disconnect":
            raise _Gone
        part = event.get("body", b"")
        size += len(part)
        if size > BODY_MAX:
            raise _Gone(size)
        more = event.get("more_body", False)
        if part:
            yield part


class _Prompt(H11Protocol):
    """uvicorn's, but a peer that asks for nothing does not keep its connection: all are counted, and few would do.

    For TLS, before, asyncio gives it a minute.
    """

    def connection_made(self, transport: Any) -> None:
        """A request is waited for."""
        super().connection_made(transport)
        self._expect(None)

    def on_response_complete(self) -> None:
        """The next one is, of which a part may be here."""
        answered = self.cycle
        super().on_response_complete()
        self._expect(answered)

    def _expect(self, last: Any) -> None:
        self.loop.call_later(HEADERS_S, self._wait_no_longer, last)

    def _wait_no_longer(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.abort()


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # what else it sends is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def server(
    host: str,
    port: int,
    superlink: str,
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
        ca: PEM file of the federation's certificate authority; without one, the SuperLink is asked without TLS.
        certificate: PEM file that is shown to sites; without one, they connect without TLS.
        key: PEM file of its private key.

    Raises: OSError or ssl.SSLError for a file that cannot be used.
    """
    verify = ssl.create_default_context(cafile=ca) if ca else False
    return uvicorn.Server(
        uvicorn.Config(
            Guard(f"{'https' if ca else 'http'}://{superlink}", verify),
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
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=10,
        )
    )
