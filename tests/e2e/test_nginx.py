"""nginx in the guard's place, before the real SuperLink: what passes, and that a site's node connects through it."""

from __future__ import annotations

import contextlib
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chexfound.identity.roster import Address
from client.home import membership
from server.federation import members
from server.federation import settings as federations
from server.services import guard, nginx
from tests.server.doors import CONTROL, INSIDE, ask, free_port, request, running_nginx

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def held(federation: Any, require: Callable[[str], Path]) -> Iterator[federations.Federation]:
    """A federation of one site, up, with nginx at its public port and the guard on another one of loopback."""
    program, port = require("nginx"), free_port()
    public, aside = Address("localhost", port), Address("127.0.0.1", free_port())
    made = federations.create(federation.folder / "thorax", "thorax", public, aside, Address("127.0.0.1", free_port()))
    keys, _ = membership.make_keys(federation.folder / "NORTH")
    made.write_sites(made.sites().with_site("NORTH", keys))
    up = federation.start("up", [sys.executable, "-m", "server.cli", "up", str(made.folder)])
    up.wait_for("up: sites connect to")
    text = nginx.configuration(made, Address("127.0.0.1", port))
    with running_nginx(program, federation.folder / "nginx", text, port):
        yield made


@pytest.fixture(scope="module")
def trust(held: federations.Federation) -> ssl.SSLContext:
    """What a peer has who holds the certificate of the authority and no more."""
    return ssl.create_default_context(cafile=str(held.path("ca.crt")))


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
def test_control_runtime_and_docs_do_not_answer_outside(held, trust: ssl.SSLContext, method: str) -> None:
    for path in INSIDE:
        answer = ask(held.public.port, request(method, path, b"", "Content-Length: 0"), trust)
        assert answer.startswith(b"HTTP/1.1 404 "), (path, answer[:200])


def test_the_superlink_itself_would_have_answered(held: federations.Federation, trust: ssl.SSLContext) -> None:
    """So that the test above can fail: on loopback it takes what nginx keeps from it."""
    assert ask(held.superlink.port, request("GET", "/openapi.json"), trust).startswith(b"HTTP/1.1 200")
    answers = [ask(held.superlink.port, request("POST", path, b"x"), trust) for path in CONTROL]
    assert not any(answer.startswith(b"HTTP/1.1 404 ") for answer in answers)


def test_without_a_registered_key_the_fleet_api_gives_nothing(held, trust: ssl.SSLContext) -> None:
    for path in sorted(guard.FLEET_PATHS):
        answer = ask(held.public.port, request("POST", path.decode(), b"", "Content-Length: 0"), trust)
        assert answer.startswith(b"HTTP/1.1 4"), (path, answer[:200])


def test_health_answers(held: federations.Federation, trust: ssl.SSLContext) -> None:
    assert ask(held.public.port, request("GET", "/health"), trust).startswith(b"HTTP/1.1 200 ")
    with contextlib.suppress(ConnectionError):
        assert not ask(held.public.port, request("GET", "/health")).startswith(b"HTTP/1.1 2")


def test_a_sites_node_connects(held: federations.Federation, federation: Any) -> None:
    home = federation.folder / "NORTH"
    command = [str(Path(sys.executable).with_name("flower-supernode")), "--superlink", str(held.public)]
    command += ["--root-certificates", str(held.path("ca.crt"))]
    command += ["--auth-supernode-private-key", str(home / "keys" / "node.key"), "--port", str(free_port())]
    node = federation.start("node", command, FLWR_HOME=str(home / "flower"))
    node.wait_for("SuperNode ID")
    assert members.nodes(held)["NORTH"].status == "online"
    assert node.stop() == 0
