"""nginx, configured by us, before the same stand-in for the SuperLink as the guard: the same must get through."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from chexfound.errors import ConfigError
from chexfound.identity.roster import Address
from server import cli
from server.federation import settings
from server.federation.settings import Federation
from server.services import guard, nginx
from tests.server.doors import (
    FORBIDDEN,
    FORGED,
    ROOT,
    Behind,
    ask,
    connect,
    free_port,
    request,
    running,
    running_nginx,
)

MIB = 2**20


def make(folder: Path, superlink: int = 8001) -> Federation:
    """A federation whose guard has stepped back to a port of loopback."""
    public, aside = Address("localhost", 8443), Address("127.0.0.1", free_port())
    return settings.create(folder, "thorax", public, aside, Address("127.0.0.1", superlink))


class Streaming(Behind):
    """Tells when the first part of a body has come, and sends the second half of an answer when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope, receive, send) -> None:
        self.loop = asyncio.get_running_loop()
        if (b"x-hold", b"1") not in scope["headers"]:

            async def heard():
                event = await receive()
                self.begun.set()
                return event

            await super().__call__(scope, heard, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.wait_for(self.may_end.wait(), 20)
        await send({"type": "http.response.body", "body": b"last"})


@pytest.fixture(scope="module")
def behind() -> Streaming:
    return Streaming()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return make(tmp_path_factory.mktemp("nginx") / 'a federation; with {odd} "name"\\\'')


@pytest.fixture(scope="module")
def trust(held: Federation) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(held.path("ca.crt")))


@pytest.fixture(scope="module")
def serve(require: Callable[[str], Path], held: Federation, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`with serve(superlink, change) as port`: nginx before that port, with a changed configuration."""
    program = require("nginx")

    def start(superlink: int, change: Callable[[str], str] = lambda text: text):
        port = free_port()
        text = nginx.configuration(held, Address("127.0.0.1", port))
        text = text.replace(f"server {held.superlink};", f"server 127.0.0.1:{superlink};")
        return port, running_nginx(program, tmp_path_factory.mktemp("door") / "nginx", change(text), port)

    return start


@pytest.fixture(scope="module")
def superlink(behind: Behind, held: Federation) -> Iterator[int]:
    config = uvicorn.Config(
        behind,
        lifespan="off",
        log_config=None,
        access_log=False,
        http="h11",
        ws="none",
        ssl_certfile=held.path("server.crt"),
        ssl_keyfile=held.path("server.key"),
    )
    with running(uvicorn.Server(config)) as port:
        yield port


@pytest.fixture(scope="module")
def door(superlink: int, serve: Callable) -> Iterator[int]:
    """nginx's port."""
    port, started = serve(superlink)
    with started:
        yield port


@pytest.fixture(autouse=True)
def _nothing_seen_yet(behind: Behind) -> None:
    behind.seen.clear()


@pytest.mark.parametrize("path", sorted(guard.FLEET_PATHS))
def test_what_a_supernode_asks_passes(door: int, behind: Behind, trust: ssl.SSLContext, path: bytes) -> None:
    answer = ask(door, request("POST", path.decode(), b"protobuf", "Flwr-Signature: abc", "TE: trailers"), trust)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-flower: yes" in answer
    (method, seen, headers, length), *others = behind.seen
    assert not others
    assert (method, seen, length) == ("POST", path, 8)
    assert headers[b"flwr-signature"] == b"abc"
    assert b"te" not in headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_passes(door: int, behind: Behind, trust: ssl.SSLContext, method: str) -> None:
    assert ask(door, request(method, "/health"), trust).startswith(b"HTTP/1.1 200 OK\r\n")
    assert [seen[:2] for seen in behind.seen] == [(method, b"/health")]


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_nothing_else_does(door: int, behind: Behind, trust: ssl.SSLContext, method: str, path: str) -> None:
    answer = ask(door, request(method, path, b"x" if method == "POST" else b""), trust)
    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert b"x-flower" not in answer
    assert not re.search(rb"nginx/\d", answer)
    assert not behind.seen


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_peer_that_says_where_it_comes_from_is_not_believed(door, behind, trust, method: str) -> None:
    assert b" 404 " in ask(door, request(method, "/v1/control/start-run", b"x", *FORGED), trust).split(b"\r\n")[0]
    assert not behind.seen
    ask(door, request("POST", "/v1/fleet/get-run", b"x", *FORGED), trust)
    assert not {b"x-forwarded-for", b"forwarded"} & set(behind.seen[0][2])


def test_a_second_request_cannot_hide_in_the_body_of_a_first(door, behind, trust) -> None:
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    chunked = f"{len(hidden):x}\r\n".encode() + hidden + b"\r\n0\r\n\r\n"
    for lengths in (["Content-Length: 4", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked"]):
        ask(door, request("POST", "/v1/fleet/get-run", b"", *lengths) + chunked, trust)
    ask(door, request("POST", "/v1/fleet/get-run", b"", "Content-Length: 4", "Content-Length: 70") + hidden, trust)
    ask(door, request("POST", "/v1/fleet/get-run", b"", "Content-Length: 4", "Transfer-Encoding: x") + hidden, trust)
    assert behind.seen
    assert {(path, length) for _, path, _, length in behind.seen} == {(b"/v1/fleet/get-run", len(hidden))}


def test_a_second_request_of_a_connection_is_judged_by_itself(door, behind, trust: ssl.SSLContext) -> None:
    first = request("GET", "/health").replace(b"Connection: close\r\n", b"")
    answer = ask(door, first + request("POST", "/v1/control/start-run", b"x"), trust)
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"HTTP/1.1 404 ") == 1
    assert [seen[1] for seen in behind.seen] == [b"/health"]


def test_without_tls_nothing_answers(door: int, behind: Behind) -> None:
    assert not ask(door, request("GET", "/health")).startswith(b"HTTP/1.1 2")
    assert not behind.seen


def test_a_body_is_passed_on_when_all_of_it_is_there(door: int, behind: Streaming, trust: ssl.SSLContext) -> None:
    """So that one which never ends takes nothing of the SuperLink."""
    behind.begun.clear()
    with connect(door, trust) as peer:
        peer.sendall(request("POST", "/v1/fleet/push-object", bytes(guard.OBJECT_MAX))[:-1])
        time.sleep(0.5)
        assert not behind.begun.is_set()
        peer.sendall(b"x")
        assert peer.recv(2**16).startswith(b"HTTP/1.1 200")
    assert [seen[3] for seen in behind.seen] == [guard.OBJECT_MAX]


def test_an_answer_goes_on_while_it_comes(door: int, behind: Streaming, trust: ssl.SSLContext) -> None:
    behind.may_end.clear()
    with connect(door, trust) as peer:
        peer.sendall(request("POST", "/v1/fleet/pull-object", b"x", "X-Hold: 1"))
        answer = b""
        while b"first" not in answer:
            answer += peer.recv(2**16)
        assert b"last" not in answer
        behind.loop.call_soon_threadsafe(behind.may_end.set)
        while part := peer.recv(2**16):
            answer += part
    assert b"last" in answer


def test_large_answers_pass(door: int, behind: Behind, trust: ssl.SSLContext) -> None:
    behind.answer = bytes(12 * MIB)
    _, _, body = ask(door, request("POST", "/v1/fleet/get-fab", b"x"), trust).partition(b"\r\n\r\n")
    behind.answer = b""
    assert len(body) >= 12 * MIB


@pytest.mark.parametrize(("path", "limit"), [("push-object", "OBJECT_MAX"), ("push-messages", "CONTROL_MAX")])
def test_a_body_beyond_the_guards_limit_is_cut_off(
    serve, superlink, behind, trust, monkeypatch: pytest.MonkeyPatch, path: str, limit: str
) -> None:
    monkeypatch.setattr(guard, limit, 10)
    port, started = serve(superlink)
    with started:
        for size, status in ((10, b" 200 "), (11, b" 413 ")):
            answer = ask(port, request("POST", f"/v1/fleet/{path}", bytes(size)), trust)
            assert status in answer.split(b"\r\n")[0]
    assert [seen[3] for seen in behind.seen] == [10]


def test_one_address_has_so_many_requests_at_once(serve, superlink, trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nginx, "ADDRESS_MAX", 2)
    port, started = serve(superlink)
    with started, contextlib.ExitStack() as stack:
        for _ in range(2):
            peer = stack.enter_context(connect(port, trust))
            peer.sendall(request("POST", "/v1/fleet/push-object", b"xx")[:-1])
        time.sleep(0.3)
        assert ask(port, request("GET", "/health"), trust).startswith(b"HTTP/1.1 503 ")


def test_a_body_that_stops_is_not_waited_for(serve, superlink, behind, trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE_S", 1.0)
    port, started = serve(superlink)
    with started:
        answer = ask(port, request("POST", "/v1/fleet/push-object", b"xx")[:-1], trust)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert not behind.seen


def test_a_superlink_of_another_authority_is_not_asked(serve, superlink, behind, trust, tmp_path: Path, held) -> None:
    other = make(tmp_path / "other")
    port, started = serve(
        superlink, lambda text: text.replace(nginx._quoted(held.path("ca.crt")), str(other.path("ca.crt")))
    )
    with started:
        answer = ask(port, request("POST", "/v1/fleet/get-run", b"x"), trust)
    assert answer.startswith(b"HTTP/1.1 502 ")  # which Flower's node takes as a reason to try again
    assert not behind.seen


# ---- what is printed


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "f")
    assert cli.main(["nginx", str(made.folder)]) == 0
    assert capsys.readouterr().out == nginx.configuration(made, Address("0.0.0.0", 8443))
    assert cli.main(["nginx", str(made.folder), "--listen", "[::1]:9443"]) == 0
    assert "listen [::1]:9443 ssl" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::"])
def test_the_guards_own_port_is_refused(tmp_path: Path, host: str) -> None:
    made = make(tmp_path / "f")
    with pytest.raises(ConfigError, match="the guard listens there; give it a port of its own on loopback"):
        nginx.configuration(made, Address(host, made.listen.port))
    with pytest.raises(ConfigError, match=r"start chexfound-server up again \(in a new federation: init --listen\)"):
        nginx.configuration(made, Address(host, made.listen.port))
    assert nginx.configuration(made, Address("10.0.0.1", made.listen.port))


def test_a_name_that_nginx_would_take_for_a_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without \\$"):
        nginx.configuration(make(tmp_path / "a$b"), Address("0.0.0.0", 8443))


def test_the_example_is_what_would_be_printed() -> None:
    example = Federation(
        folder=Path("/srv/thorax"),
        name="thorax",
        public=Address("coordinator.example.org", 8443),
        listen=Address("127.0.0.1", 8444),
        superlink=Address("127.0.0.1", 8001),
    )
    text = (ROOT / "deploy" / "nginx" / "chexfound.conf").read_text()
    assert text == nginx.configuration(example, Address("0.0.0.0", 8443))
