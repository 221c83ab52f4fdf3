from __future__ import annotations

import datetime
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chexfound.errors import ConfigError
from chexfound.identity.roster import Address
from client.home import link
from client.node import supernode
from server.federation import pki

COORDINATOR = Address("coordinator.invalid", 8443)


def test_answers(without_proxy: None, open_door: Callable[..., int], authority: Path, closed_port: int) -> None:
    for scheme, folder in (("https", authority), ("http", None)):
        assert link.answers(Address("127.0.0.1", open_door(folder)), scheme)
    assert not link.answers(Address("127.0.0.1", closed_port), "https")
    assert not link.answers(COORDINATOR, "https")


def test_answers_behind_a_proxy(
    without_proxy: None, monkeypatch: pytest.MonkeyPatch, make_proxy: Callable[..., Any], open_door: Callable[..., int],
    authority: Path, closed_port: int,
) -> None:  # fmt: skip
    """A proxy that listens is not yet a coordinator that does."""
    proxy = make_proxy({"coordinator.invalid": "127.0.0.1"})
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    assert link.answers(Address("coordinator.invalid", open_door(authority)), "https")
    assert not link.answers(Address("elsewhere.invalid", 8443), "https")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port}")
    assert not link.answers(COORDINATOR, "https")


def test_what_listens_and_says_nothing_answers(without_proxy: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert link.answers(Address("127.0.0.1", server.getsockname()[1]), "http", 0.1)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_proxy_is_for_the_coordinator_and_not_for_this_machine(
    without_proxy: None, monkeypatch: pytest.MonkeyPatch, make_proxy: Callable[..., Any], tmp_path: Path,
    open_door: Callable[..., int], authority: Path, variable: str,
) -> None:  # fmt: skip
    """In the environment that Flower's node is given."""
    proxy = make_proxy({"coordinator.invalid": "127.0.0.1"})
    monkeypatch.setenv(variable, proxy.url)
    port = open_door(authority)
    trust = link.trust((authority / "ca.crt").read_text())
    for name, value in supernode.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    contact = link.ask(Address("coordinator.invalid", port), trust)
    assert str(contact.proxy) == proxy.address
    assert contact.response is not None
    for host in ("127.0.0.1", "localhost"):
        direct = link.ask(Address(host, port), trust)
        assert (direct.proxy, direct.response is not None) == (None, True)
    assert set(proxy.asked) == {f"CONNECT coordinator.invalid:{port}"}


def test_a_proxy_that_cannot_be_used_is_told_without_its_password(
    without_proxy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "ftp://user:hunter2@proxy.invalid")
    with pytest.raises(ConfigError, match="write http://HOST:PORT") as caught:
        link.ask(COORDINATOR, False)
    assert "hunter2" not in str(caught.value)


def test_the_dates_of_a_certificate_are_not_looked_at_but_its_name_and_authority_are(
    without_proxy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_door: Callable[..., int], authority: Path
) -> None:
    monkeypatch.setattr(pki, "EARLY", datetime.timedelta(days=5))
    monkeypatch.setattr(pki, "SERVER_DAYS", -2)
    pki.make_server(authority, ["localhost"])
    pki.make_authority(tmp_path / "other", "thorax")
    here, port = (authority / "ca.crt").read_text(), open_door(authority)
    assert link.ask(Address("localhost", port), link.trust(here)).response is not None
    other = link.ask(Address("localhost", port), link.trust((tmp_path / "other" / "ca.crt").read_text()))
    assert other.response is other.certificate is None
    assert other.tls_error is not None
    named = link.ask(Address("127.0.0.2", open_door(authority, "127.0.0.2")), link.trust(here))
    assert named.response is named.certificate is None
