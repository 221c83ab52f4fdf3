"""Whoever reaches the public port without a key: what he can take of it, and whether the sites still get through.

The real guard before the real SuperLink, by TLS.  On the code before, 500 bodies of 256 KiB took 166 MiB of the
SuperLink for good and 335 of the guard, 2,060 connections that said nothing left everybody else a 503, and /health with
a body was a 500 with a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from chexfound.identity.roster import Keys
from client.node import flwr_private as node
from server.federation import members
from server.services import guard, places
from tests.hostile.machine import Machine, machine
from tests.server.doors import Node, request, running, write_roster

BODIES, SENT = 500, 256 * 2**10  # slow bodies, and what is sent of each
FLAT = 16 * 2**20  # of memory, that the SuperLink may take under an attack
PLACES = 96 * 2**20  # that the guard may: TLS keeps half a MB for each connection of the 64 that one address has


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A federation of two sites; the SuperLink knows their nodes."""
    with machine(tmp_path_factory.mktemp("stranger")) as one:
        for name in ("NORTH", "SOUTH"):
            one.enrol(name)
        one.start("superlink")
        assert members.register_all(one.held)[0] == ["NORTH", "SOUTH"]
        one.start("guard")
        yield one


@pytest.fixture(scope="module")
def trust(here: Machine) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(here.held.path("ca.crt")))


def connect(here: Machine, trust: ssl.SSLContext | None) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", here.held.listen.port), timeout=20)
    return trust.wrap_socket(plain, server_hostname="localhost") if trust else plain


def ask(here: Machine, trust: ssl.SSLContext, text: bytes) -> bytes:
    """All that comes back."""
    answer = b""
    with connect(here, trust) as peer:
        peer.sendall(text)
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := peer.recv(2**16):
                answer += part
    return answer


def slow_body(headers: list[str], path: str = "push-object", announced: int = guard.OBJECT_MAX) -> bytes:
    """The headers of a request whose body will not end."""
    return request("POST", f"/v1/fleet/{path}", b"", *headers, f"Content-Length: {announced}")


def all_is_well(here: Machine, trust: ssl.SSLContext, name: str = "NORTH") -> None:
    """/health answers and a registered site gets through to the SuperLink, each in seconds."""
    start = time.monotonic()
    assert ask(here, trust, request("GET", "/health")).startswith(b"HTTP/1.1 200 ")
    authority = here.held.path("ca.crt").read_bytes()
    assert node.registered(str(here.held.public), authority, here.sites[name].key)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("who", ["no key", "a key of his own", "a site's key without its signature"])
def test_bodies_that_never_end_fill_no_memory_and_keep_nobody_out(
    here: Machine, trust: ssl.SSLContext, who: str
) -> None:
    stranger = Node()
    headers = {"no key": [], "a key of his own": stranger.headers()}.get(who, here.sites["NORTH"].headers(by=stranger))
    number = BODIES if who == "no key" else 50
    before = here.memory("superlink"), here.memory("guard")
    with contextlib.ExitStack() as stack:
        refused = 0
        for count in range(number):
            peer = stack.enter_context(connect(here, trust))
            with contextlib.suppress(OSError):
                peer.sendall(slow_body(headers) + bytes(SENT))
            with contextlib.suppress(OSError):
                refused += peer.recv(1000).startswith(b"HTTP/1.1 401 ")
            if count == number // 2:
                all_is_well(here, trust)
        all_is_well(here, trust)
        assert refused > 0.9 * number  # the others were hung up on before they read it
        assert here.memory("superlink") - before[0] < FLAT
        assert here.memory("guard") - before[1] < PLACES


def test_connections_that_say_nothing_or_half_a_request_keep_nobody_out(here: Machine, trust: ssl.SSLContext) -> None:
    """More than the door has places: without TLS, with TLS and nothing, with half of the headers."""
    with contextlib.ExitStack() as stack:
        for number in range(3 * places.STRANGERS_MAX // 2):
            peer = stack.enter_context(connect(here, None if number % 3 else trust))
            if not number % 6:
                peer.sendall(slow_body([])[:-2])
        all_is_well(here, trust)
        all_is_well(here, trust, "SOUTH")
    assert here.up("guard")


def test_silent_connections_from_ports_that_were_reset_have_their_time_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the connection before, seen late, took the place of the next: 36 of 40 stayed, counted by nobody."""
    for module in (guard, places):
        monkeypatch.setattr(module, "HEADERS_S", 2.0)
    roster = write_roster(tmp_path / "roster.json", NORTH=Node())
    superlink = uvicorn.Server(uvicorn.Config(slowly, lifespan="off", log_config=None, http="h11", ws="none"))
    with running(superlink) as behind, contextlib.ExitStack() as stack:
        door = guard.server("127.0.0.1", 0, f"127.0.0.1:{behind}", roster)
        with running(door) as port:
            silent = [stack.enter_context(come_back(port)) for _ in range(20)]
            for peer in silent:
                peer.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    assert peer.recv(1) == b""  # hung up on, and nothing said


async def slowly(scope: Any, receive: Any, send: Any) -> None:
    """A SuperLink that takes a while to say how it is; the door reads nothing more of who asked meanwhile."""
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def come_back(port: int) -> socket.socket:
    """A connection that says nothing, at the port of one that asked twice and was reset."""
    first = at(0)
    own = first.getsockname()[1]
    first.connect(("127.0.0.1", port))
    first.sendall(2 * b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.1)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    first.close()
    second = at(own)
    second.connect(("127.0.0.1", port))
    return second


def at(port: int) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", port))
    return one


def test_health_with_a_body_is_no_traceback(here: Machine, trust: ssl.SSLContext) -> None:
    for headers in (["Content-Length: 5"], ["Transfer-Encoding: chunked"]):
        assert ask(here, trust, request("GET", "/health", b"", *headers)).startswith(b"HTTP/1.1 400 ")
    assert "Traceback" not in here.log("guard")
    all_is_well(here, trust)


def test_a_registered_site_cannot_fill_the_door_either(here: Machine, trust: ssl.SSLContext) -> None:
    """It has its places, and the others theirs; a body that announces too much is not read."""
    north = here.sites["NORTH"]
    for path, announced in (("push-object", guard.OBJECT_MAX + 1), ("push-messages", guard.CONTROL_MAX + 1)):
        answer = ask(here, trust, slow_body(north.headers(), path, announced))
        assert answer.startswith(b"HTTP/1.1 413 "), answer
    before = here.memory("superlink")
    with contextlib.ExitStack() as stack:
        full = 0
        for _ in range(places.SITE_MAX + 8):
            peer = stack.enter_context(connect(here, trust))
            peer.sendall(slow_body(north.headers()) + bytes(SENT))
            peer.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                full += peer.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert full == 8
        all_is_well(here, trust, "SOUTH")
        assert here.memory("superlink") - before < places.SITE_MAX * SENT + FLAT
    time.sleep(0.5)
    all_is_well(here, trust, "NORTH")


def test_a_site_that_was_removed_is_a_stranger_at_once(here: Machine, trust: ssl.SSLContext) -> None:
    east = here.enrol("EAST")
    text = request("POST", "/v1/fleet/get-run", b"x", *east.headers())
    passed = ask(here, trust, text)  # to the SuperLink, which cannot read an x
    assert not passed.startswith(b"HTTP/1.1 401 "), passed
    here.held.write_sites(here.held.sites().without_site("EAST"))
    assert ask(here, trust, text).startswith(b"HTTP/1.1 401 ")
    assert isinstance(here.held.sites().sites["NORTH"], Keys)
