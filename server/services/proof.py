"""Proof of who asks: the signature in a request's headers, held against the roster before its body is read.

Flower's node signs the time, and nothing else: neither path nor body.  So all of its signature can be checked before
the body; what the SuperLink checks after it is that the node's number, which stands in the body, is that of the key.
And whoever saw a request could repeat its headers for five minutes; TLS keeps them from everybody but the two ends.
"""

from __future__ import annotations

import binascii
import datetime
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from chexfound.errors import ChexfoundError
from chexfound.identity import roster

log = logging.getLogger("chexfound.guard")

# As Flower has them, which is not imported here: it would treble what the guard takes of memory.
HEADERS = (b"flwr-public-key", b"flwr-timestamp", b"flwr-signature")
BEHIND_S, AHEAD_S = 305.0, 5.0  # that a node's clock may be; exclusive
NOT_REGISTERED = 412, b'{"code": 2004, "detail": "Failed to activate SuperNode."}'  # a node that wants to connect


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
            key = load_ssh_public_key(keys.node.encode("ascii"))
            assert isinstance(key, ec.EllipticCurvePublicKey)  # a roster has no others
            shown = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            self._sites[b64encode(shown)] = name, key

    def site(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The name of the site that sends these headers.

        Raises: NoProof.
        """
        self._renew()
        shown, when, signature = (_only(headers, name) for name in HEADERS)
        if shown not in self._sites:  # compared as it was sent: nothing of a stranger's key is parsed
            raise UnknownKey("no site of the roster has this key")
        name, key = self._sites[shown]
        _check(key, when, signature)
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


def _check(key: ec.EllipticCurvePublicKey, when: bytes, signature: bytes) -> None:
    """Raise NoProof unless a key signed this time, and that is now."""
    try:
        signed_at = datetime.datetime.fromisoformat(when.decode("ascii"))
        age = (datetime.datetime.now(datetime.UTC) - signed_at).total_seconds()
        if not -AHEAD_S < age < BEHIND_S:
            raise NoProof(f"it was signed {age:.0f} s ago by our clock")
        key.verify(b64decode(signature, validate=True), when, ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, binascii.Error) as error:
        raise NoProof("its time or its signature cannot be read") from error
    except InvalidSignature as error:
        raise NoProof("its signature is false") from error
