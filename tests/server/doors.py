"""What the tests of both doors of a federation share: the guard, and nginx in its place."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.superlink.routers.control.router import router as control_router

from chexfound.durable.files import write_json
from chexfound.identity.roster import Keys, Roster
from chexfound.identity.signing import public_line

ROOT = Path(__file__).resolve().parents[2]

# Method and target of requests that no SuperNode makes.
FORBIDDEN = [
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/list-nodes"),
    ("POST", "/v1/runtime/acquire-task"),
    ("POST", "/v1/responses"),
    ("GET", "/docs"),
    ("GET", "/docs/oauth2-redirect"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("POST", "/health"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health?x=1"),
    ("GET", "/v1/fleet/pull-messages"),
    ("PUT", "/v1/fleet/pull-messages"),
    ("DELETE", "/v1/fleet/pull-messages"),
    ("PATCH", "/v1/fleet/pull-messages"),
    ("HEAD", "/v1/fleet/pull-messages"),
    ("OPTIONS", "/v1/fleet/pull-messages"),
    ("OPTIONS", "*"),
    ("TRACE", "/v1/fleet/pull-messages"),
    ("CONNECT", "127.0.0.1:80"),
    ("post", "/v1/fleet/pull-messages"),
    ("POST", "/v1/fleet"),
    ("POST", "/v1/fleet/"),
    ("POST", "/v1/fleet/unknown"),
    ("POST", "/v1/fleet/pull-messages/"),
    ("POST", "/v1/fleet/pull-messages?node=1"),
    ("POST", "/v1/fleet/pull-messages;x"),
    ("POST", "/v1/fleet/pull-messages%20"),
    ("POST", "/v1/fleet/pull-messages%00"),
    ("POST", "/v1/fleet/pull%2Dmessages"),
    ("POST", "/v1/fleet//pull-messages"),
    ("POST", "//v1/fleet/pull-messages"),
    ("POST", "/v1/fleet/../control/start-run"),
    ("POST", "/v1/fleet/..%2fcontrol/start-run"),
    ("POST", "/v1/fleet/%2e%2e/control/start-run"),
    ("POST", "/v1/fleet/%252e%252e/control/start-run"),
    ("POST", "/v1/fleet/pull-messages/../../control/start-run"),
    ("POST", "/v1%2Ffleet%2Fpull-messages"),
    ("POST", "/v1/Fleet/pull-messages"),
    ("POST", "/V1/FLEET/PULL-MESSAGES"),
    ("POST", "/v1\\fleet\\pull-messages"),
    ("POST", "http://superlink/v1/control/start-run"),
    ("POST", "http://superlink/v1/fleet/pull-messages"),
]

# What the SuperLink answers on loopback, and other ways to write some of it.
CONTROL = sorted({f"/v1/control{route.path.removeprefix('/v1/control')}" for route in control_router.routes})
INSIDE = [
    *CONTROL,
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/v1/responses",
    "/docs",
    "/openapi.json",
    "/",
    "//v1/control/list-nodes",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/..%2Fcontrol%2Flist-nodes",
    "/v1%2Fcontrol%2Flist-nodes",
    "/v1/control//list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
]

# Headers by which some servers let a peer say where it comes from, or ask for something else than it seems to.
FORGED = [
    "X-Forwarded-For: 127.0.0.1",
    "Forwarded: for=127.0.0.1",
    "X-Original-URL: /v1/fleet/get-run",
    "X-HTTP-Method-Override: POST",
    "X-Rewrite-URL: /health",
]


class Node:
    """The keys of a site: a node's, which signs requests, and an identity."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        line = self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.keys = Keys(line, public_line(ed25519.Ed25519PrivateKey.generate().public_key()))

    def headers(self, seconds_ago: float = 0.0, by: Node | None = None) -> list[str]:
        """As Flower's node signs the time; `by`: with the key of another."""
        when = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)).isoformat()
        shown = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        signature = (by or self).key.sign(when.encode(), ec.ECDSA(hashes.SHA256()))
        values = {
            "public-key": b64encode(shown).decode(),
            "timestamp": when,
            "signature": b64encode(signature).decode(),
        }
        return [f"flwr-{name}: {value}" for name, value in values.items()]


def write_roster(path: Path, **nodes: Node) -> Path:
    """A roster of these sites."""
    sites = Roster(federation="thorax", serial=len(nodes), sites={name: node.keys for name, node in nodes.items()})
    write_json(path, sites.as_dict())
    return path


@dataclass
class Behind:
    """The stand-in: keeps what reached it, and answers 200 with how long the body was."""

    seen: list[tuple[str, bytes, dict[bytes, bytes], int]] = field(default_factory=list)
    answer: bytes = b""

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        length, more = 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            length += len(event["body"])
            more = event["more_body"]
        self.seen.append((scope["method"], scope["raw_path"], dict(scope["headers"]), length))
        body = self.answer or str(length).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-flower", b"yes")]})
        for start in range(0, len(body), 2**20):
            await send({"type": "http.response.body", "body": body[start : start + 2**20], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Iterator[int]:
    """In a thread; yields the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def connect(port: int, context: ssl.SSLContext | None = None) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=20)
    return context.wrap_socket(peer, server_hostname="localhost") if context else peer


def ask(port: int, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Send bytes as they are, by TLS if a context says how; all that comes back until the other end closes."""
    with connect(port, context) as peer:
        peer.sendall(request)
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := peer.recv(2**16):
                answer += part
        return bytes(answer)


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: federation", "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def running_nginx(program: Path, folder: Path, configuration: str, port: int) -> Iterator[None]:
    """nginx with the shipped main configuration, which keeps all that it writes in the folder."""
    folder.mkdir()
    shutil.copy(ROOT / "deploy" / "nginx" / "nginx.conf", folder)
    (folder / "chexfound.conf").write_text(configuration)
    log = folder / "error.log"
    command = [program, "-p", folder, "-c", "nginx.conf", "-e", "error.log"]
    if os.geteuid() == 0:  # its workers, which keep bodies in the folder, would be nobody
        command += ["-g", "user root;"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=20).close()
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
