"""Keys of one attempt: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869) and AES-256-GCM, all of `cryptography`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chexfound.errors import RefusedError
from chexfound.identity import signing
from chexfound.secagg.messages import Attempt, names_digest

NONCE_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Hold what a site must not tell in one attempt, each 32 bytes from the system's generator.

    Args:
        cipher: private X25519 key; opens the shares that were dealt to this site.
        mask: private X25519 key; gives the pairwise masks.
        seed: of the site's own mask.
    """

    cipher: bytes = field(repr=False)
    mask: bytes = field(repr=False)
    seed: bytes = field(repr=False)

    @staticmethod
    def fresh() -> Secrets:
        """New ones."""
        return Secrets(cipher=os.urandom(32), mask=os.urandom(32), seed=os.urandom(32))


def public(private: bytes) -> str:
    """The public key of a private one; hex."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def canonical(key: str) -> bool:
    """Whether a public key is written as X25519 writes it; it reads others as the same (RFC 7748, 5)."""
    return int.from_bytes(bytes.fromhex(key), "little") < 2**255 - 19


def agree(private: bytes, peer: str, purpose: str, fields: list[bytes]) -> bytes:
    """The 32 bytes that two sites have in common, for one purpose.

    `peer` is the other's public key, in hex.

    Raises: RefusedError for a key that agrees on zero with everyone (RFC 7748, 6.1).
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(bytes.fromhex(peer))
        )
    except ValueError as error:
        raise RefusedError("secagg.cohort", "a key of small order") from error
    return _derive(shared, purpose, fields)


def _derive(secret: bytes, purpose: str, fields: list[bytes]) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=signing.statement(purpose, fields)).derive(secret)


def pair_seed(
    private: bytes, peer: str, attempt: Attempt, context: bytes, sharers: list[str], pair: tuple[str, str]
) -> bytes:
    """The seed of the mask that two sites share.

    It binds the context, the sharers and both names: a colluder that advertises another's key gets another seed, and
    sites that were told different sets have masks that do not cancel.  `pair` has both names, in the roster's order.
    """
    fields = [*attempt.fields(), context, names_digest(sharers), *(name.encode() for name in pair)]
    return agree(private, peer, "chexfound secagg pair v1", fields)


def own_seed(seed: bytes, attempt: Attempt, context: bytes, sharers: list[str], site: str) -> bytes:
    """The seed of a site's own mask in this context."""
    fields = [*attempt.fields(), context, names_digest(sharers), site.encode()]
    return _derive(seed, "chexfound secagg self v1", fields)


def _channel(attempt: Attempt, context: bytes, dealer: str, holder: str) -> list[bytes]:
    return [*attempt.fields(), context, dealer.encode(), holder.encode()]


def seal(private: bytes, peer: str, attempt: Attempt, context: bytes, packet: tuple[str, str], text: bytes) -> bytes:
    """Seal what a dealer gives to a holder (`packet`: their names); nonce, then ciphertext with its tag."""
    fields = _channel(attempt, context, *packet)
    key = agree(private, peer, "chexfound secagg seal v1", fields)
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, signing.statement("chexfound secagg seal v1", fields))


def unseal(
    private: bytes, peer: str, attempt: Attempt, context: bytes, packet: tuple[str, str], sealed: bytes
) -> bytes:
    """Open what a dealer sealed for this holder.

    Raises: RefusedError.
    """
    fields = _channel(attempt, context, *packet)
    key = agree(private, peer, "chexfound secagg seal v1", fields)
    try:
        associated = signing.statement("chexfound secagg seal v1", fields)
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError) as error:
        raise RefusedError("secagg.shares", f"the shares of {packet[0]!r} do not open") from error
