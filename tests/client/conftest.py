"""A coordinator's door on loopback, a site that was approved for it, and a proxy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP

from chexfound.durable.files import write_json
from chexfound.identity.roster import Address, Roster
from client.home import membership
from server.federation import pki
from server.services import guard


class SuperLink:
    """A stand-in that answers as Flower's does to the calls of the preflight."""

    def __init__(self) -> None:
        self.registered = True
        self.bits_per_second = 0.0  # at which it reads; 0: as they come
        self.status = 200  # of /health
        self.uploaded = 0

    async def __call__(self, scope, receive, send) -> None:
        length, more = 0, True
        while more:
            event = await receive()
            length, more = length + len(event["body"]), event["more_body"]
            if self.bits_per_second:
                await asyncio.sleep(8 * len(event["body"]) / self.bits_per_second)
        status, body = self._answer(scope["path"], length)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, path: str, length: int) -> tuple[int, bytes]:
        if path == "/health":
            return self.status, b""
        if path == "/v1/fleet/activate-node":
            fault = "FLEET_INVALID_HEARTBEAT_INTERVAL" if self.registered else "FLEET_NODE_ACTIVATION_FAILED"
            spec = API_ERROR_MAP[ApiErrorCode[fault]]
            return spec.http_status_code, json.dumps(
                FlowerError(ApiErrorCode[fault], "").to_json(spec.public_message)
            ).encode()
        self.uploaded += length
        return 401, b'{"detail":"Invalid SuperNode authentication"}'


@contextlib.contextmanager
def serving(server: uvicorn.Server, host: str = "127.0.0.1") -> Iterator[int]:
    """In a thread; yields the port."""
    with socket.socket() as listener:
        listener.bind((host, 0))
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


@pytest.fixture(scope="session")
def superlink_port() -> Iterator[tuple[SuperLink, int]]:
    app = SuperLink()
    with serving(uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, http="h11", ws="none"))) as port:
        yield app, port


@pytest.fixture
def superlink(superlink_port: tuple[SuperLink, int]) -> SuperLink:
    """The stand-in behind every door, as new."""
    superlink_port[0].__init__()
    return superlink_port[0]


@pytest.fixture
def open_door(
    superlink: SuperLink, superlink_port: tuple[SuperLink, int], tmp_path: Path
) -> Iterator[Callable[..., int]]:
    """`open_door(folder, "127.0.0.1", behind)`: a guard with the certificate of a folder, or plain HTTP; its port.

    Behind it is the stand-in, or the SuperLink of an address, with the roster of its folder.
    """
    with contextlib.ExitStack() as stack:

        def start(folder: Path | None, host: str = "127.0.0.1", behind: Address | None = None) -> int:
            files = {"certificate": str(folder / "server.crt"), "key": str(folder / "server.key")} if folder else {}
            if behind is not None:
                files["ca"] = str(folder / "ca.crt")
            sites = (folder if behind else tmp_path) / "roster.json"
            if not sites.exists():
                write_json(sites, Roster(federation="thorax", serial=0).as_dict())
            server = guard.server(host, 0, str(behind or f"127.0.0.1:{superlink_port[1]}"), sites, **files)
            return stack.enter_context(serving(server, host))

        yield start


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A folder with an authority, and a server's certificate for loopback."""
    folder = tmp_path / "authority"
    pki.make_authority(folder, "thorax")
    pki.make_server(folder, ["coordinator.invalid"])
    return folder


@pytest.fixture
def enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_proxy: None) -> Callable[..., Path]:
    """`enrolled(authority, address)`: the home of a site NORTH that approved a federation there."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHEXFOUND_GPUS", raising=False)

    def make(authority: Path, server: Address) -> Path:
        home = tmp_path / "home" / "sites" / "NORTH"
        keys, _ = membership.make_keys(home)
        sites = Roster(federation="thorax", serial=1, sites={"NORTH": keys})
        write_json(tmp_path / "roster.json", sites.as_dict())  # for the guard of open_door
        text = (authority / "ca.crt").read_text()
        membership.approve(
            home, membership.ApprovedFederation(name="thorax", server=server, authority=text, sites=sites)
        )
        return home

    return make


class Proxy:
    """Passes CONNECT on, and only to names that it knows; keeps what it was asked for."""

    def __init__(self, known: dict[str, str], credentials: str = "") -> None:
        self.asked: list[str] = []
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (part := self.request.recv(2**16)):
                        return
                    head += part
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                proxy.asked.append(f"{method} {target}")
                host, _, port = target.rpartition(":")
                wanted = f"Proxy-Authorization: Basic {base64.b64encode(credentials.encode()).decode()}"
                if credentials and wanted.lower().encode() not in head.lower():
                    self.request.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                elif method != "CONNECT" or host not in known:
                    self.request.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                else:
                    with socket.create_connection((known[host], int(port))) as behind:
                        self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                        relay(self.request, behind)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        at = f"127.0.0.1:{self._server.server_address[1]}"
        self.address, self.url = at, f"http://{credentials}{'@' if credentials else ''}{at}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def relay(one: socket.socket, other: socket.socket) -> None:
    """Bytes both ways, until one end closes."""
    while True:
        for source in select.select([one, other], [], [])[0]:
            try:
                data = source.recv(2**16)
                if not data:
                    return
                (other if source is one else one).sendall(data)
            except OSError:
                return


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., Proxy]]:
    """`make_proxy({"coordinator.invalid": "127.0.0.1"}, "user:password")`."""
    made: list[Proxy] = []

    def make(known: dict[str, str], credentials: str = "") -> Proxy:
        made.append(Proxy(known, credentials))
        return made[-1]

    yield make
    for proxy in made:
        proxy.stop()


@pytest.fixture
def closed_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the environment that httpx reads."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
