"""The guard before a stand-in for the SuperLink that answers everything: what gets through is the guard's doing."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import flwr
import pytest
import uvicorn
from flwr.superlink.routers.fleet.router import router as fleet_router

from chexfound import __version__
from server import guard
from tests.server.doors import FORBIDDEN, FORGED, Behind, ask, free_port, request, running


@pytest.fixture(scope="module")
def behind() -> Behind:
    return Behind()


@pytest.fixture(scope="module")
def door(behind: Behind) -> Iterator[int]:
    """The guard's port."""
    config = uvicorn.Config(behind, lifespan="off", log_config=None, access_log=False, http="h11", ws="none")
    with running(uvicorn.Server(config)) as port, running(guard.server("127.0.0.1", 0, f"127.0.0.1:{port}")) as outside:
        yield outside


@pytest.fixture(autouse=True)
def _nothing_seen_yet(behind: Behind) -> None:
    behind.seen.clear()
    behind.answer = b""


def test_the_paths_are_those_of_flowers_fleet_api() -> None:
    """A Flower release with another one needs a decision here, not a pattern that lets it through."""
    assert {f"/v1/fleet{route.path.removeprefix('/v1/fleet')}".encode() for route in fleet_router.routes} == (
        guard.FLEET_PATHS
    )
    assert {method for route in fleet_router.routes for method in route.methods} == {"POST"}


@pytest.mark.parametrize("path", sorted(guard.FLEET_PATHS))
def test_what_a_supernode_asks_passes(door: int, behind: Behind, path: bytes) -> None:
    answer = ask(door, request("POST", path.decode(), b"protobuf", "X-Flwr-Signature: abc", "TE: trailers"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-flower: yes" in answer
    assert b"chexfound-version" not in answer
    (method, seen, headers, length), *others = behind.seen
    assert not others
    assert (method, seen, length) == ("POST", path, 8)
    assert headers[b"x-flwr-signature"] == b"abc"
    assert b"te" not in headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_passes(door: int, behind: Behind, method: str) -> None:
    answer = ask(door, request(method, "/health"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"chexfound-version: {__version__}\r\n".encode() in answer
    assert f"flower-version: {flwr.__version__}\r\n".encode() in answer
    assert [seen[:2] for seen in behind.seen] == [(method, b"/health")]


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_nothing_else_does(door: int, behind: Behind, method: str, path: str) -> None:
    answer = ask(door, request(method, path, b"x" if method == "POST" else b""))
    assert answer.startswith((b"HTTP/1.1 404 Not Found\r\n", b"HTTP/1.1 400 Bad Request\r\n"))
    assert b"x-flower" not in answer
    assert not behind.seen


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_peer_that_says_where_it_comes_from_is_not_believed(door: int, behind: Behind, method: str) -> None:
    assert b" 404 " in ask(door, request(method, "/v1/control/start-run", b"x", *FORGED)).split(b"\r\n")[0]
    assert not behind.seen


def test_a_websocket_is_not_opened(door: int, behind: Behind) -> None:
    upgrade = ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    text = request("GET", "/v1/control/stream-logs", b"", *upgrade).replace(
        b"Connection: close", b"Connection: Upgrade"
    )
    assert not ask(door, text + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 101")
    assert not behind.seen


def test_a_second_request_cannot_hide_in_the_body_of_a_first(door: int, behind: Behind) -> None:
    """Two lengths (RFC 9112, 6.3): the body goes on in the framing in which it was read, as one body."""
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    chunked = f"{len(hidden):x}\r\n".encode() + hidden + b"\r\n0\r\n\r\n"
    for lengths in (["Content-Length: 4", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked"]):
        ask(door, request("POST", "/v1/fleet/get-run", b"", *lengths) + chunked)
    ask(door, request("POST", "/v1/fleet/get-run", b"", "Content-Length: 4", "Content-Length: 70") + hidden)
    ask(door, request("POST", "/v1/fleet/get-run", b"", "Content-Length: 4", "Transfer-Encoding: x") + hidden)
    assert {path for _, path, _, _ in behind.seen} <= {b"/v1/fleet/get-run"}
    assert all(length == len(hidden) for _, _, _, length in behind.seen)


def test_a_header_that_connection_names_stays_here(door: int, behind: Behind) -> None:
    text = request("POST", "/v1/fleet/get-run", b"x", "X-Secret: 1").replace(b": close", b": close, x-secret")
    assert b" 200 " in ask(door, text)
    assert b"x-secret" not in behind.seen[0][2]


def test_large_bodies_pass_both_ways(door: int, behind: Behind) -> None:
    behind.answer = bytes(12 * 2**20)
    answer = ask(door, request("POST", "/v1/fleet/push-object", bytes(8 * 2**20)))
    assert behind.seen[0][3] == 8 * 2**20
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) >= 12 * 2**20  # and the chunks' lengths


def test_a_body_beyond_the_limit_is_cut_off(door: int, behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_MAX", 10)
    assert b" 413 " in ask(door, request("POST", "/v1/fleet/push-object", bytes(11))).split(b"\r\n")[0]
    assert not behind.seen


def test_a_peer_that_hangs_up_costs_nothing(door: int, behind: Behind) -> None:
    with socket.create_connection(("127.0.0.1", door), timeout=20) as peer:
        peer.sendall(request("POST", "/v1/fleet/push-object", b"x").replace(b"Length: 1", b"Length: 100"))
    assert b" 200 " in ask(door, request("POST", "/v1/fleet/push-object", b"x"))
    assert [length for *_, length in behind.seen] == [1]


@pytest.mark.parametrize("before", [b"", b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n", None])
def test_a_peer_that_asks_for_nothing_does_not_keep_its_connection(
    door: int, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    """There are 2048 for all; whoever reaches the port could take them, and every site got a 503."""
    monkeypatch.setattr(guard, "HEADERS_S", 0.3)
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        if before is None:  # one request, and a part of another
            peer.sendall(request("GET", "/health").replace(b"close", b"keep-alive"))
            assert b" 200 " in peer.recv(10_000)
            before = b"GET"
        peer.sendall(before)
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(10_000):
                pass


def test_a_body_that_does_not_come_is_not_waited_for(door: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SILENCE_S", 0.3)
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        peer.sendall(request("POST", "/v1/fleet/push-object", b"x").replace(b"Length: 1", b"Length: 100"))
        while peer.recv(10_000):
            pass


def test_a_superlink_that_is_down_is_said() -> None:
    with running(guard.server("127.0.0.1", 0, f"127.0.0.1:{free_port()}")) as port:
        answer = ask(port, request("POST", "/v1/fleet/get-run", b"x"))
    assert answer.startswith(b"HTTP/1.1 503 ")  # which Flower's node takes as a reason to try again
