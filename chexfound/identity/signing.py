"""Signatures of a site's identity key, each for one purpose only.

What is signed is the purpose's tag and the fields, each with its length before it: no two lists of fields give the
same bytes, and a signature for one purpose is none for another.  Ed25519 (RFC 8032); keys are written as OpenSSH
writes them, so that `ssh-keygen -lf` shows the same fingerprint.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from chexfound.errors import ProtocolError

REPLY = "chexfound reply v1"  # run, round, message id, SHA-256 of the payload
ROSTER = "chexfound roster v1"  # the roster's canonical JSON
# Secure aggregation; each after the attempt: run, phase, round, attempt.
ADVERT = "chexfound secagg advert v1"  # site, both keys, commitment, findings, minimum, state
PACKET = "chexfound secagg packet v1"  # context, dealer, holder, sealed shares, both hashes
MASKED = "chexfound secagg masked v1"  # context, site, sharers, SHA-256 of the masked arrays
SURVIVORS = "chexfound secagg survivors v1"  # context, sharers, survivors


def statement(purpose: str, fields: Sequence[bytes]) -> bytes:
    """The bytes that are signed: purpose and fields, each after its length in 8 bytes, big-endian."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *fields))


def sign(key: Ed25519PrivateKey, purpose: str, fields: Sequence[bytes]) -> bytes:
    """The signature, 64 bytes."""
    return key.sign(statement(purpose, fields))


def verify(key: Ed25519PublicKey, signature: bytes, purpose: str, fields: Sequence[bytes]) -> None:
    """Check a signature.

    Raises: ProtocolError if it is not one of these fields, for this purpose, by this key.
    """
    try:
        key.verify(signature, statement(purpose, fields))
    except InvalidSignature as error:
        raise ProtocolError(f"the signature of a {purpose!r} does not fit its key and its contents") from error


def public_line(key: Ed25519PublicKey) -> str:
    """`ssh-ed25519 AAAA…`, as in an OpenSSH .pub file."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def read_public_line(line: str) -> Ed25519PublicKey:
    """The key of such a line; a comment after it is left out.

    Raises: ProtocolError for anything else.
    """
    try:
        key = serialization.load_ssh_public_key(" ".join(line.split()[:2]).encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"not an Ed25519 key in OpenSSH's format: {line[:80]!r}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError(f"a key of another kind where an Ed25519 one belongs: {line[:80]!r}")
    return key


def fingerprint(line: str) -> str:
    """`SHA256:…` of a public line, as `ssh-keygen -lf` shows it: of the key itself, not of the comment."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")
