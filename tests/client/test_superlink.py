"""Against Flower's own SuperLink and SuperNode, with TLS and authentication of nodes; and through a proxy alone."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from chexfound.identity.bundle import Bundle
from chexfound.identity.roster import Address, Roster
from client.home import approval, link, membership
from client.home.paths import close
from client.node import flwr_private, supernode
from client.operator.preflight import checks, remote
from client.operator.preflight.order import CHECKS
from server.federation import members
from server.federation import settings as federations
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


class Process:
    """One that writes to a file, in a session of its own."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command, env=dict(env), stdout=output, stderr=output, cwd=log.parent, start_new_session=True
            )

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Fails if the process ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[federations.Federation]:
    """A SuperLink, to which one site's node is known; that of `stranger` is not."""
    folder = tmp_path_factory.mktemp("superlink")
    address = Address("127.0.0.1", supernode.free_port())
    one = federations.create(folder / "thorax", "thorax", Address("coordinator.invalid", 1), Address("::1", 1), address)
    known, _ = membership.make_keys(folder / "known")
    membership.make_keys(folder / "stranger")
    one.write_sites(one.sites().with_site("NORTH", known))
    program, *options = one.commands()["superlink"]
    command = [str(Path(sys.executable).with_name(program)), *options]
    process = Process(command, one.environment(), folder / "superlink.log")
    try:
        with pytest.MonkeyPatch.context() as here:
            for name in ("NO_PROXY", "no_proxy"):
                here.setenv(name, "127.0.0.1,localhost")
            process.wait_until(lambda: link.answers(address, "https"))
            assert members.register_all(one) == (["NORTH"], [], {})
            yield one
    finally:
        process.stop()


def registered(federation: federations.Federation, name: str) -> bool:
    key = membership.node_key(federation.folder.parent / name)
    return flwr_private.registered(str(federation.superlink), federation.path("ca.crt").read_bytes(), key)


def test_a_known_key_and_a_strange_one_are_told_apart(federation: federations.Federation) -> None:
    """Without a change there: the node stays as it was registered."""
    assert registered(federation, "known")
    assert not registered(federation, "stranger")
    assert members.nodes(federation)["NORTH"].status == "registered"


@pytest.mark.parametrize("name", ["known", "stranger"])
def test_all_is_well_but_for_a_key_that_is_not_registered(
    federation: federations.Federation, open_door: Callable[..., int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The whole preflight, with the guard between."""
    home = federation.folder.parent / name
    keys = membership.public_keys(home)
    monkeypatch.setattr(flwr_private, "release_bundle", lambda: Bundle({}))
    monkeypatch.setattr(remote, "UPLINK_BYTES", (2**16, 2**18))
    approval.approve(home, Bundle({}).digest())
    server = Address("localhost", open_door(federation.folder, behind=federation.superlink))
    sites = Roster(federation="thorax", serial=1, sites={"NORTH": keys})
    text = federation.path("ca.crt").read_text()
    membership.approve(home, membership.ApprovedFederation(name="thorax", server=server, authority=text, sites=sites))
    close(home)  # as if the umask had been a site's
    found = checks.run(checks.Subject("NORTH", home), CHECKS)
    assert [one.name for one in found if one.state == "failed"] == (["key"] if name == "stranger" else [])
    assert [one.name for one in found if one.state == "skipped"] == (["uplink"] if name == "stranger" else [])


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_clocks_that_are_borne_are_those_that_flower_bears(
    federation: federations.Federation, monkeypatch: pytest.MonkeyPatch, within: bool, ahead: bool
) -> None:
    late, early = flwr_private.clock_tolerance()
    seconds = (early if ahead else -late) * (0.5 if within else 1.1)
    there = "flwr.supernode.node_auth_http_interceptor.now"
    monkeypatch.setattr(there, lambda: link.now() + datetime.timedelta(seconds=seconds))
    if within:
        assert registered(federation, "known")
    else:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            registered(federation, "known")


def test_an_upload_that_names_no_node_is_read_and_refused(federation: federations.Federation) -> None:
    """Though it is signed by a site's key: so the uplink can be timed, and nothing is stored."""
    path, body, headers = flwr_private.stray_object(2**20, membership.node_key(federation.folder.parent / "known"))
    trust = link.trust(federation.path("ca.crt").read_text())
    with link.client(trust) as client:
        assert client.post(f"https://{federation.superlink}{path}", content=body, headers=headers).status_code == 401


def is_connected_to(port: int) -> bool:
    """Whether a process has a connection to a port of loopback."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any((row[2], row[3]) == (f"0100007F:{port:04X}", "01") for row in rows)


def test_a_node_behind_a_proxy(
    federation: federations.Federation, make_proxy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The coordinator is reached through it alone, by a name that only it can look up, and this machine without it.

    The worker asks the node for work, on a port of loopback.
    """
    proxy = make_proxy({"coordinator.invalid": "127.0.0.1"}, "user:hunter2")
    with monkeypatch.context() as there:
        for name in ("NO_PROXY", "no_proxy"):
            there.delenv(name)
        for name in ("HTTPS_PROXY", "HTTP_PROXY"):
            there.setenv(name, proxy.url)
        env = supernode.environment(tmp_path / "flower")
    keys = supernode.Credentials(federation.path("ca.crt"), federation.folder.parent / "known" / "keys" / "node.key")
    address = f"coordinator.invalid:{federation.superlink.port}"
    commands = supernode.commands(tmp_path, address, 'site="NORTH" data="/nowhere"', keys)
    processes = {name: Process(command, env, tmp_path / f"{name}.log") for name, command in commands.items()}
    node, worker = processes["supernode"], processes["worker"]
    try:
        node.wait_until(lambda: "SuperNode ID" in node.log.read_text())
        port = commands["supernode"][commands["supernode"].index("--port") + 1]
        worker.wait_until(lambda: is_connected_to(int(port)))
        assert registered(federation, "known")
        assert members.nodes(federation)["NORTH"].status == "online"  # whom the question did not disturb
    finally:
        for process in processes.values():
            process.stop()
    assert set(proxy.asked) == {f"CONNECT {address}"}
    assert not any("hunter2" in process.log.read_text() for process in processes.values())
