"""The way to the coordinator, tried as Flower's node goes it: by httpx, which follows HTTPS_PROXY and NO_PROXY.

What is connected to first is heard from httpx itself, so that there is one judge of what the environment means.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from chexfound.errors import ConfigError
from chexfound.identity.roster import Address

TIMEOUT_S = 10.0
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for


@dataclass
class Contact:
    """Hold what came of one request for /health.

    Args:
        address: of the coordinator.
        peer: what was connected to: the coordinator, or a proxy.
        connected: whether that took the connection.
        certificate: that was shown and believed (DER).
        response: what came back.
        error: what came in its place.
        when: this machine's clock, in the middle between question and answer.
    """

    address: Address
    peer: Address | None = None
    connected: bool = False
    certificate: bytes | None = None
    response: httpx.Response | None = None
    error: httpx.HTTPError | None = None
    when: datetime.datetime | None = None

    @property
    def proxy(self) -> Address | None:
        """The proxy that it went through, if it did."""
        return self.peer if self.peer and str(self.peer).lower() != str(self.address).lower() else None

    @property
    def refused_by_proxy(self) -> str | None:
        """Give what the proxy said in place of passing it on."""
        return str(self.error) if isinstance(self.error, httpx.ProxyError) else None

    @property
    def tls_error(self) -> ssl.SSLError | None:
        """Why there was no TLS."""
        return next((error for error in causes(self.error) if isinstance(error, ssl.SSLError)), None)


def now() -> datetime.datetime:
    """This machine's clock."""
    return datetime.datetime.now(datetime.UTC)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def client(verify: ssl.SSLContext | bool, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """Make an HTTP client as Flower's node makes its own.

    Raises: ConfigError if the environment names a proxy that cannot be used.
    """
    try:
        return httpx.Client(verify=verify, timeout=timeout_s)
    except (ValueError, ImportError) as error:  # their text may hold the proxy's password
        raise ConfigError(
            "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names a proxy that cannot be used; write http://HOST:PORT"
        ) from error


def ask(
    address: Address, verify: ssl.SSLContext | bool, scheme: str = "https", timeout_s: float = TIMEOUT_S
) -> Contact:
    """Ask for /health, and say how far it got.

    Raises: ConfigError, as `client`.
    """
    contact = Contact(address)

    def follow(event: str, values: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            contact.peer = Address(str(values["host"]), int(values["port"]))
        elif event == "connection.connect_tcp.complete":
            contact.connected = True
        elif event.endswith("start_tls.complete"):
            contact.certificate = values["return_value"].get_extra_info("ssl_object").getpeercert(True)

    with client(verify, timeout_s) as opened:
        before = now()
        try:
            contact.response = opened.get(f"{scheme}://{address}/health", extensions={"trace": follow})
        except httpx.HTTPError as error:
            contact.error = error
        contact.when = before + (now() - before) / 2
    return contact


def answers(address: Address, scheme: str, timeout_s: float = 2.0) -> bool:
    """Tell whether anything listens at an address now; behind a proxy, whether that gets through."""
    contact = ask(address, False, scheme, timeout_s)  # nothing is told, so nobody need prove who he is
    return contact.connected and contact.refused_by_proxy is None


def trust(authority: str) -> ssl.SSLContext:
    """Believe certificates of the federation's authority, as Flower's node does, but whatever their dates.

    With a wrong clock at either end the dates say nothing: they are looked at for themselves.  For what may be read
    by anyone only.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
    return context


def believe_anyone() -> ssl.SSLContext:
    """To see whose certificate is shown by a peer that was not believed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
