"""Places for the connections of a door: strangers share a few, each site has its own.

Nobody can be known before his connection has shown a key, so nobody is turned away for want of a place before that:
who comes takes the place of the stranger who has had his longest, of the same address first.  A site's connection needs
its place for the time of a TLS handshake and one request's headers; from then on it is the site's, and no stranger can
take it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial

STRANGERS_MAX = 512  # connections at once that have shown no key, of all addresses
ADDRESS_MAX = 64  # of these from one address (of IPv6, one /64)
SITE_MAX = 32  # connections at once of one site; Flower's node has two objects under way, and its heartbeat
HEADERS_S = 30.0  # in which a connection has to make its first request, TLS and headers included
LINGER_S = 2.0  # in which a peer that was refused may read why

Peer = tuple[str, int]


class Places:
    """Hold who is connected, by address and port, and how each is hung up on."""

    def __init__(self) -> None:
        self._here: dict[Peer, Callable[[], None]] = {}
        self._silent: set[Peer] = set()
        self._strangers: dict[Peer, str] = {}  # the oldest first, with their networks
        self._sites: dict[Peer, str] = {}

    def enter(self, peer: Peer, hang_up: Callable[[], None]) -> None:
        """Give a new connection its place; hang up on the stranger in whose place it is."""
        self._forget(peer)  # that of a connection which was reset: the port is used again before its end is seen here
        network = _network(peer[0])
        beside = [other for other, where in self._strangers.items() if where == network]
        if len(beside) >= ADDRESS_MAX:
            self._drop(beside[0])
        elif len(self._strangers) >= STRANGERS_MAX:
            self._drop(next(iter(self._strangers)))
        self._here[peer], self._strangers[peer] = hang_up, network
        self._silent.add(peer)

    def leave(self, peer: Peer, hang_up: Callable[[], None]) -> None:
        """A connection has ended; its place is left unless it is another's by now, from the same port."""
        if self._here.get(peer) is hang_up:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        self._here.pop(peer, None)
        self._strangers.pop(peer, None)
        self._sites.pop(peer, None)
        self._silent.discard(peer)

    def asks(self, peer: Peer) -> None:
        """The connection has made a request."""
        self._silent.discard(peer)

    def prove(self, peer: Peer, site: str) -> bool:
        """Make the connection a site's, unless the site has all of its own already."""
        if self._sites.get(peer) != site:
            if sum(other == site for other in self._sites.values()) >= SITE_MAX:
                return False
            self._strangers.pop(peer, None)
            self._sites[peer] = site
        return True

    def expire(self, peer: Peer, hang_up: Callable[[], None], *, silent: bool = True) -> None:
        """Hang up on a connection if it is still that one; `silent`: and has asked for nothing yet."""
        if self._here.get(peer) is hang_up and (peer in self._silent or not silent):
            self._drop(peer)

    def dismiss(self, peer: Peer) -> None:
        """Hang up on a connection soon, whatever it does: it was refused."""
        if hang_up := self._here.get(peer):
            asyncio.get_running_loop().call_later(LINGER_S, partial(self.expire, peer, hang_up, silent=False))

    def _drop(self, peer: Peer) -> None:
        hang_up = self._here[peer]
        self._forget(peer)
        hang_up()


def _network(host: str) -> str:
    address = ipaddress.ip_address(host)
    return host if address.version == 4 else str(ipaddress.ip_network((int(address), 64), strict=False))


class HeldPlace(socket.socket):
    """An accepted connection, in its place until it is closed."""

    def __init__(self, accepted: socket.socket, peer: Peer, places: Places) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._peer, self._places, self._ends = peer, places, self.hang_up
        places.enter(peer, self._ends)
        asyncio.get_running_loop().call_later(HEADERS_S, places.expire, peer, self._ends)

    def hang_up(self) -> None:
        """End it under whoever reads and writes it, who then closes it."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it, as asyncio does at its end."""
        if self.fileno() >= 0:
            self._places.leave(self._peer, self._ends)
        super().close()

    def detach(self) -> int:
        """Give its number back, as uvloop does to close it itself."""
        self._places.leave(self._peer, self._ends)
        return super().detach()
