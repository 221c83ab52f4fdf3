"""A federation as `chexfound-server` and `chexfound-client` make it: TLS, node keys, the guard; and who is kept out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound import recipe as recipes
from chexfound import signing
from chexfound.schema import Recipe
from client import membership, supernode
from tests.server.doors import INSIDE

pytestmark = pytest.mark.e2e
NAMES = ("NORTH", "SOUTH")


class Secured:
    """The federation, while it runs, and what its one run left."""

    def __init__(self, federation: Any) -> None:
        self.processes, self.folder = federation, federation.folder / "thorax"
        self.port, superlink = free_port(), free_port()
        self.address = f"localhost:{self.port}"
        ports = [
            "--public",
            self.address,
            "--listen",
            f"127.0.0.1:{self.port}",
            "--superlink",
            f"127.0.0.1:{superlink}",
        ]
        self.server("init", "--name", "thorax", *ports)

    def home(self, site: str) -> Path:
        return self.processes.folder / site

    def server(self, command: str, *options: str) -> str:
        return self._do([sys.executable, "-m", "server.cli", command, str(self.folder), *options], self.folder.parent)

    def client(self, site: str, *options: str) -> str:
        return self._do([sys.executable, "-m", "client.cli", *options], self.home(site))

    def _do(self, command: list[str], home: Path) -> str:
        env = self.processes.env | {"CHEXFOUND_HOME": str(home)}
        done = subprocess.run(command, env=env, cwd=self.folder.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve(self, site: str, data: Path, px: int) -> Any:
        command = [sys.executable, "-m", "client.cli", "--data", str(data), "--image-px", str(px)]
        return self.processes.start(f"client-{site}", command, CHEXFOUND_HOME=str(self.home(site)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def secured(federation: Any, make_site: Callable[..., Path], recipe: Recipe, tmp_path_factory: Any) -> Secured:
    """Two hospitals, from nothing to the report."""
    images, made = tmp_path_factory.mktemp("images"), Secured(federation)
    data = {name: make_site(images / name.lower(), name, 40, 80) for name in NAMES}
    for name in NAMES:
        made.client(name, "enrol", "--name", name)
        made.server("add-site", name, str(made.folder.parent / f"{name}.pub"))
    for name in NAMES:
        made.client(name, "roster", "approve", str(made.folder / "thorax.federation.json"), "--yes")
        assert "differs from the installed release 0.1.0: nothing" in made.client(name, "approve")
    made.images = images
    made.up = federation.start("up", [sys.executable, "-m", "server.cli", "up", str(made.folder)])
    made.up.wait_for("up: sites connect to")
    made.sites = {name: made.serve(name, data[name], recipe.image_px) for name in NAMES}
    run_config = federation.folder / "recipe.toml"
    run_config.write_text(recipes.to_run_config(recipe))
    command = [str(Path(sys.executable).with_name("flwr")), "run", ".", "federation", "--stream", "-c", str(run_config)]
    made.run = federation.start("run", command, FLWR_HOME=str(made.folder / "flower"))
    for step in ("event=start", "phase=pretrain round=2", "event=features", "phase=adapt round=1", "event=written"):
        made.run.wait_for(step)
    made.run.wait()
    return made


def ask(secured: Secured, request: bytes, tls: bool = True) -> bytes:
    """By somebody who holds the certificate of the authority and no more."""
    context = ssl.create_default_context(cafile=str(secured.folder / "ca.crt"))
    with socket.create_connection(("127.0.0.1", secured.port), timeout=30) as peer:
        end = context.wrap_socket(peer, server_hostname="localhost") if tls else peer
        end.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := end.recv(2**16):
                answer += part
        end.close()
    return answer


def test_the_model_is_that_of_the_run_in_process(
    secured: Secured, simulate: Callable[..., str], tmp_path: Path
) -> None:
    found = re.search(r"event=written folder=(\S+)", secured.run.text)
    assert found
    assert Path(found[1]).parent == secured.folder / "runs"
    metrics = json.loads((Path(found[1]) / "metrics.json").read_text())
    assert metrics["model_sha256"]["federated"] == simulate(secured.images, tmp_path, 2)


def test_the_sites_are_listed_as_connected(secured: Secured) -> None:
    told = json.loads(secured.server("sites", "--json"))
    assert told["superlink"] == "up"
    assert {one["site"]: one["status"] for one in told["sites"]} == dict.fromkeys(NAMES, "online")
    keys = membership.public_keys(secured.home("NORTH") / "sites" / "NORTH")
    assert told["sites"][0]["node"] == signing.fingerprint(keys.node)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_control_runtime_and_docs_do_not_answer_outside(secured: Secured, method: str) -> None:
    for path in INSIDE:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n"
        answer = ask(secured, f"{head}Content-Type: application/x-protobuf\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404 "), (path, answer[:200])


def test_without_tls_nothing_answers(secured: Secured) -> None:
    assert b"HTTP/1.1 2" not in ask(secured, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", tls=False)
    assert ask(secured, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def node(secured: Secured, home: Path, authority: Path, name: str) -> Any:
    """Flower's node with some keys and some authority, until it says something of itself."""
    keys = supernode.Credentials(authority, home / "keys" / "node.key")
    command = supernode.commands(home, secured.address, 'site="X" data="/nowhere"', keys)["supernode"]
    return secured.processes.start(name, [*command, "--max-retries", "1"], FLWR_HOME=str(home / "flower"))


def test_a_key_that_is_not_registered_is_refused(secured: Secured, tmp_path: Path) -> None:
    membership.make_keys(tmp_path)
    stranger = node(secured, tmp_path, secured.folder / "ca.crt", "stranger")
    assert stranger.wait() != 0
    assert "SuperNode ID" not in stranger.text


def test_a_second_client_with_the_same_key_is_refused(secured: Secured) -> None:
    second = node(secured, secured.home("NORTH") / "sites" / "NORTH", secured.folder / "ca.crt", "second")
    assert second.wait() != 0
    assert "SuperNode ID" not in second.text
    assert secured.sites["NORTH"].running


def test_a_server_of_another_authority_is_not_talked_to(secured: Secured, tmp_path: Path) -> None:
    from server import pki

    pki.make_authority(tmp_path / "other", "thorax")
    home = secured.home("NORTH") / "sites" / "NORTH"
    deceived = node(secured, home, tmp_path / "other" / "ca.crt", "deceived")
    assert deceived.wait() != 0
    assert "CERTIFICATE_VERIFY_FAILED" in deceived.text


def test_a_site_that_was_removed_is_out(secured: Secured) -> None:
    """Last: it changes the federation."""
    secured.server("remove-site", "SOUTH")
    told = json.loads(secured.server("sites", "--json"))
    assert [one["site"] for one in told["sites"]] == ["NORTH"]
    secured.sites["SOUTH"].stop()
    again = node(secured, secured.home("SOUTH") / "sites" / "SOUTH", secured.folder / "ca.crt", "again")
    assert again.wait() != 0
    assert "SuperNode ID" not in again.text


def test_all_ends_with_the_coordinator(secured: Secured) -> None:
    assert secured.up.stop() == 0
    assert secured.up.text.rstrip().endswith("stopped")
    assert secured.sites["NORTH"].stop() == 0
    assert os.path.exists(secured.folder / "superlink.sqlite")
