"""Who asks: the signature in a request's headers, held against the roster before anything of its body is read.

Flower's node signs the time, and nothing else: neither path nor body.  So all of its signature can be checked before
the body; what the SuperLink checks after it is that the node's number, which stands in the body, is that of the key.
And whoever saw a request could repeat its headers for five minutes; TLS keeps them from everybody but the two ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from chexfound import roster
from chexfound.errors import ChexfoundError
from server import flwr_private

log = logging.getLogger("chexfound.guard")


class NoProof(Exception):
    """A request without the signature of a site; says what is wrong with it."""


class UnknownKey(NoProof):
    """A request that names a key which no site of the roster has."""


class Proof:
    """The node keys of a roster, which is read again whenever its file was changed.

    Args:
        path: the roster's file.

    Raises: ConfigError if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = self._stat()
        self._read()

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self._path)
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> None:
        sites = roster.load(self._path).sites
        self._sites: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = {}
        for name, keys in sites.items():
            shown, key = flwr_private.node_proof(keys.node)
            self._sites[shown] = name, key

    def site(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The name of the site that sends these headers.

        Raises: NoProof.
        """
        self._renew()
        shown, when, signature = (_only(headers, name) for name in flwr_private.PROOF_HEADERS)
        if shown not in self._sites:  # compared as it was sent: nothing of a stranger's key is parsed
            raise UnknownKey("no site of the roster has this key")
        name, key = self._sites[shown]
        if why := flwr_private.proof_fault(key, when, signature):
            raise NoProof(why)
        return name

    def _renew(self) -> None:
        if (version := self._stat()) == self._version:
            return
        self._version = version
        try:
            self._read()
        except ChexfoundError as error:  # those that were known go on
            log.error("event=roster-unreadable error=%s %s", error.code, error)
        else:
            log.info("event=roster sites=%d", len(self._sites))


def _only(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    found = [value for given, value in headers if given == name]
    if len(found) != 1:
        raise NoProof(f"{len(found)} headers {name.decode()} where one belongs")
    return found[0]
