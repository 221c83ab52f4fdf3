"""A site's signature over what it replies: run, round, message id and the payload's hash."""

from __future__ import annotations

import hashlib
import json

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from chexfound.errors import (
    ProtocolError,
)
from chexfound.identity import signing
from chexfound.parsing.names import is_name as is_name  # the rule for every name that arrives


def payload_sha256(content: RecordDict) -> bytes:
    """SHA-256 of all that a message's content holds but the signature of a reply; every part after its length."""
    whole = hashlib.sha256()

    def add(part: bytes) -> None:
        whole.update(len(part).to_bytes(8, "big"))
        whole.update(part)

    for name in sorted(content):
        record = content[name]
        add(name.encode())
        if isinstance(record, ConfigRecord):
            add(b"config")
            signed = {key: repr(value) for key, value in record.items() if (name, key) != ("reply", "ed25519")}
            add(json.dumps(signed, sort_keys=True).encode())
        elif isinstance(record, ArrayRecord):
            add(b"arrays")
            add(str(len(record)).encode())  # or an array could be read as the next record
            for key, array in sorted(record.items()):
                add(json.dumps([key, array.dtype, list(array.shape), array.stype]).encode())
                add(array.data)
        else:
            raise ProtocolError(f"the message holds a {type(record).__name__}")
    return whole.digest()


def _signed_fields(content: RecordDict, run_id: int, round_number: int, message_id: str) -> list[bytes]:
    return [str(run_id).encode(), str(round_number).encode(), message_id.encode(), payload_sha256(content)]


def sign_reply(content: RecordDict, key: Ed25519PrivateKey, run_id: int, round_number: int, message_id: str) -> None:
    """Put a site's signature into a reply: over run, round, the request's message id and the payload's hash."""
    signature = signing.sign(key, signing.REPLY, _signed_fields(content, run_id, round_number, message_id))
    content.config_records["reply"]["ed25519"] = signature


def verify_reply(content: RecordDict, key: Ed25519PublicKey, run_id: int, round_number: int, message_id: str) -> None:
    """Check that a reply is the one which that site's key signed, to that request.

    Raises: ProtocolError.
    """
    try:
        signature = content.config_records["reply"]["ed25519"]
    except KeyError as error:
        raise ProtocolError("the reply is not signed") from error
    if not isinstance(signature, bytes):
        raise ProtocolError("the reply's signature is not one")
    signing.verify(key, signature, signing.REPLY, _signed_fields(content, run_id, round_number, message_id))
