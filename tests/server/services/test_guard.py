"""The guard before a stand-in for the SuperLink that answers everything: what gets through is the guard's doing."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import flwr
import pytest
import uvicorn
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.superlink.routers.fleet.router import router as fleet_router

from chexfound import __version__
from chexfound.contract.detached import PART_MAX
from server.services import guard, places
from tests.server.doors import FORBIDDEN, FORGED, Behind, Node, ask, free_port, request, running, write_roster


@pytest.fixture(scope="module")
def behind() -> Behind:
    return Behind()


@pytest.fixture(scope="module")
def north() -> Node:
    """A site of the roster."""
    return Node()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, north: Node) -> Path:
    return write_roster(tmp_path_factory.mktemp("federation") / "roster.json", NORTH=north)


@pytest.fixture(scope="module")
def door(behind: Behind, sites: Path) -> Iterator[int]:
    """The guard's port."""
    config = uvicorn.Config(behind, lifespan="off", log_config=None, access_log=False, http="h11", ws="none")
    with (
        running(uvicorn.Server(config)) as port,
        running(guard.server("127.0.0.1", 0, f"127.0.0.1:{port}", sites)) as outside,
    ):
        yield outside


@pytest.fixture
def post(north: Node):
    """A POST that NORTH signed."""
    return lambda path, body=b"", *headers: request("POST", path, body, *north.headers(), *headers)


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
def test_what_a_supernode_asks_passes(door: int, behind: Behind, post, path: bytes) -> None:
    answer = ask(door, post(path.decode(), b"protobuf", "X-Flower: abc", "TE: trailers"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-flower: yes" in answer
    assert b"chexfound-version" not in answer
    (method, seen, headers, length), *others = behind.seen
    assert not others
    assert (method, seen, length) == ("POST", path, 8)
    assert headers[b"x-flower"] == b"abc"
    assert {b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"} <= set(headers)
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


def test_a_second_request_cannot_hide_in_the_body_of_a_first(door: int, behind: Behind, post) -> None:
    """Two lengths (RFC 9112, 6.3): the body goes on in the framing in which it was read, as one body."""
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    chunked = f"{len(hidden):x}\r\n".encode() + hidden + b"\r\n0\r\n\r\n"
    for lengths in (["Content-Length: 4", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked"]):
        ask(door, post("/v1/fleet/get-run", b"", *lengths) + chunked)
        ask(door, post("/v1/fleet/push-object", b"", *lengths) + chunked)
    ask(door, post("/v1/fleet/get-run", b"", "Content-Length: 4", "Content-Length: 70") + hidden)
    ask(door, post("/v1/fleet/get-run", b"", "Content-Length: 4", "Transfer-Encoding: x") + hidden)
    assert [path for _, path, _, _ in behind.seen] == [b"/v1/fleet/get-run", b"/v1/fleet/push-object"] * 2
    assert all(length == len(hidden) for _, _, _, length in behind.seen)


def test_a_header_that_connection_names_stays_here(door: int, behind: Behind, post) -> None:
    text = post("/v1/fleet/get-run", b"x", "X-Secret: 1").replace(b": close", b": close, x-secret")
    assert b" 200 " in ask(door, text)
    assert b"x-secret" not in behind.seen[0][2]


def test_large_bodies_pass_both_ways(door: int, behind: Behind, post) -> None:
    behind.answer = bytes(12 * 2**20)
    answer = ask(door, post("/v1/fleet/push-object", bytes(guard.OBJECT_MAX)))
    assert behind.seen[0][3] == guard.OBJECT_MAX
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) >= 12 * 2**20  # and the chunks' lengths


@pytest.mark.parametrize(("path", "limit"), [("push-object", "OBJECT_MAX"), ("push-messages", "CONTROL_MAX")])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_cut_off(
    door: int, behind: Behind, post, monkeypatch: pytest.MonkeyPatch, path: str, limit: str, announced: bool
) -> None:
    monkeypatch.setattr(guard, limit, 10)
    for size, status in ((10, b" 200 "), (11, b" 413 ")):
        if announced:
            answer = ask(door, post(f"/v1/fleet/{path}", bytes(size)))
        else:
            chunked = f"{size:x}\r\n".encode() + bytes(size) + b"\r\n0\r\n\r\n"
            answer = ask(door, post(f"/v1/fleet/{path}", b"", "Transfer-Encoding: chunked") + chunked)
        assert status in answer.split(b"\r\n")[0]
    assert [seen[3] for seen in behind.seen] == [10]


def test_what_honest_sites_send_is_within_the_limits_with_room() -> None:
    """The largest: a reply in parts of 1 GB (parts.PART_MAX) is announced by the numbers of its objects."""
    number = "0" * 64
    chunks = [ObjectTree(object_id=number) for _ in range(math.ceil(PART_MAX / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE))]
    tree = ObjectTree(object_id=number, children=[ObjectTree(object_id=number, children=chunks)])
    announced = PushMessagesRequest(message_object_trees=[tree]).ByteSize()
    assert 10_000 < announced < guard.CONTROL_MAX / 3
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE < guard.OBJECT_MAX / 1.5


def test_a_peer_that_hangs_up_costs_nothing(door: int, behind: Behind, post) -> None:
    with socket.create_connection(("127.0.0.1", door), timeout=20) as peer:
        peer.sendall(post("/v1/fleet/push-object", b"x").replace(b"Length: 1", b"Length: 100"))
    assert b" 200 " in ask(door, post("/v1/fleet/push-object", b"x"))
    assert [length for *_, length in behind.seen] == [1]


# ---- who asks


def unread(door: int, text: bytes) -> bytes:
    """The answer to a request whose body is announced, and never sent."""
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        peer.sendall(text)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := peer.recv(10_000):
                answer += part
        return answer


def refused(door: int, behind: Behind, headers: list[str], path: str = "push-object") -> bytes:
    """The status line of the answer that came before the body, of which the SuperLink has seen nothing."""
    answer = unread(door, request("POST", f"/v1/fleet/{path}", b"", *headers, "Content-Length: 1000000"))
    assert not behind.seen
    assert b"connection: close" in answer.lower()
    return answer.split(b"\r\n")[0]


@pytest.mark.parametrize("path", sorted(name.decode().removeprefix("/v1/fleet/") for name in guard.FLEET_PATHS))
def test_without_a_signature_nothing_of_a_body_is_read(door: int, behind: Behind, path: str) -> None:
    assert b" 401 " in refused(door, behind, [], path)


def test_a_key_that_is_not_in_the_roster_is_refused_before_the_body(door: int, behind: Behind) -> None:
    assert b" 401 " in refused(door, behind, Node().headers())


def test_a_node_that_is_not_registered_is_told_in_flowers_words(door: int, behind: Behind) -> None:
    """As the SuperLink would: it ends the node with a line that says what happened."""
    text = request("POST", "/v1/fleet/activate-node", b"", *Node().headers(), "Content-Length: 100")
    answer = unread(door, text)
    assert answer.startswith(b"HTTP/1.1 412 ")
    assert b'"code": 2004' in answer
    assert not behind.seen


@pytest.mark.parametrize("seconds_ago", [-10.0, 310.0, 1e9])
def test_a_stale_signature_is_refused_before_the_body(
    door: int, behind: Behind, north: Node, seconds_ago: float
) -> None:
    assert b" 401 " in refused(door, behind, north.headers(seconds_ago))


def test_a_clock_that_flower_bears_is_borne(door: int, behind: Behind, north: Node) -> None:
    for seconds_ago in (300.0, -4.0):
        text = request("POST", "/v1/fleet/get-run", b"x", *north.headers(seconds_ago))
        assert b" 200 " in ask(door, text).split(b"\r\n")[0]


def test_the_signature_of_another_key_is_refused_before_the_body(door: int, behind: Behind, north: Node) -> None:
    assert b" 401 " in refused(door, behind, north.headers(by=Node()))


def test_headers_that_are_no_proof_are_refused(door: int, behind: Behind, north: Node) -> None:
    key, when, signature = north.headers()
    naive = when.split("+")[0]
    for headers in (
        [key, when],
        [key, when, signature, signature],
        [key, key.replace("MI", "Mi"), when, signature],
        [key, naive, signature],
        [key, "flwr-timestamp: yesterday", signature],
        [key, when + "0", signature],
        [key, when, "flwr-signature: ????"],
        [key, when, "flwr-signature: "],
        [key, "flwr-timestamp: \xff", signature],
    ):
        assert b" 401 " in refused(door, behind, headers)


def test_the_roster_changes_without_a_new_start(door: int, behind: Behind, sites: Path, north: Node) -> None:
    late = Node()
    text = request("POST", "/v1/fleet/get-run", b"x", *late.headers())
    assert b" 401 " in ask(door, text)
    write_roster(sites, NORTH=north, LATE=late)
    assert b" 200 " in ask(door, text)
    write_roster(sites, NORTH=north)
    assert b" 401 " in ask(door, text)


def test_a_roster_that_is_damaged_leaves_those_who_were_known(
    door: int, post, sites: Path, north: Node, caplog: pytest.LogCaptureFixture
) -> None:
    sites.write_text("{")
    with caplog.at_level(logging.ERROR, "chexfound.guard"):
        assert b" 200 " in ask(door, post("/v1/fleet/get-run", b"x"))
    assert "roster-unreadable" in caplog.text
    write_roster(sites, NORTH=north)


# ---- places and time


def test_a_site_has_its_own_places_and_no_more(
    door: int, post, north: Node, sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    south = Node()
    write_roster(sites, NORTH=north, SOUTH=south)
    monkeypatch.setattr(places, "SITE_MAX", 3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", door), timeout=5))
            peer.sendall(post("/v1/fleet/push-object").replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n"))
        time.sleep(0.3)
        assert b" 503 " in ask(door, post("/v1/fleet/get-run", b"x"))
        assert b" 200 " in ask(door, request("POST", "/v1/fleet/get-run", b"x", *south.headers()))
    time.sleep(0.3)
    assert b" 200 " in ask(door, post("/v1/fleet/get-run", b"x"))
    write_roster(sites, NORTH=north)


@pytest.mark.parametrize("before", [b"", b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n", None])
def test_a_peer_that_asks_for_nothing_does_not_keep_its_connection(
    door: int, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    monkeypatch.setattr(guard, "HEADERS_S", 0.3)
    monkeypatch.setattr(places, "HEADERS_S", 0.3)
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        if before is None:  # one request, and a part of another
            peer.sendall(request("GET", "/health").replace(b"close", b"keep-alive"))
            assert b" 200 " in peer.recv(10_000)
            before = b"GET"
        peer.sendall(before)
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(10_000):
                pass


@pytest.mark.parametrize("path", ["push-object", "get-run"])
def test_a_body_that_does_not_come_is_not_waited_for(
    door: int, post, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.3)
    text = post(f"/v1/fleet/{path}", b"x").replace(b"Length: 1", b"Length: 100")
    assert b" 408 " in unread(door, text).split(b"\r\n")[0]


@pytest.mark.parametrize(("limit", "value"), [("LEAST_BYTES_S", 1000.0), ("BODY_S", 0.6)])
def test_a_body_that_trickles_is_cut_off(
    door: int, post, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.2)
    monkeypatch.setattr(guard, "LEAST_BYTES_S", 10.0)
    monkeypatch.setattr(guard, limit, value)
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        peer.sendall(post("/v1/fleet/push-object", b"x").replace(b"Length: 1", b"Length: 100000"))
        with pytest.raises(OSError, match=r"."):  # noqa: PT012 (what breaks is one of the sends)
            while time.monotonic() < start + 5:
                peer.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() < start + 2


def test_a_body_that_comes_at_the_least_rate_passes(
    door: int, behind: Behind, post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 0.3)
    monkeypatch.setattr(guard, "LEAST_BYTES_S", 100.0)
    with socket.create_connection(("127.0.0.1", door), timeout=5) as peer:
        peer.sendall(post("/v1/fleet/push-object", b"x").replace(b"Length: 1", b"Length: 201"))
        for _ in range(20):
            peer.sendall(bytes(10))
            time.sleep(0.05)
        assert peer.recv(10_000).startswith(b"HTTP/1.1 200")
    assert [length for *_, length in behind.seen] == [201]


# ---- /health


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_with_a_body_is_refused_without_a_traceback(
    door: int, behind: Behind, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    assert ask(door, request(method, "/health", b"", "Content-Length: 0")).startswith(b"HTTP/1.1 200 ")
    behind.seen.clear()
    for text in (
        request(method, "/health", b"hello"),
        request(method, "/health", b"", "Content-Length: 5"),
        request(method, "/health", b"", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    ):
        assert unread(door, text).startswith(b"HTTP/1.1 400 ")
    assert not behind.seen
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_a_superlink_that_is_down_is_said(sites: Path, north: Node) -> None:
    with running(guard.server("127.0.0.1", 0, f"127.0.0.1:{free_port()}", sites)) as port:
        for text in (request("POST", "/v1/fleet/get-run", b"x", *north.headers()), request("GET", "/health")):
            assert ask(port, text).startswith(b"HTTP/1.1 503 ")  # which Flower's node takes as a reason to try again
