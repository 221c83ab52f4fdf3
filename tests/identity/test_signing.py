from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ProtocolError
from chexfound.identity import signing

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
Fields = st.lists(st.binary(max_size=6), max_size=4)


def test_the_library_signs_as_rfc_8032() -> None:
    """RFC 8032, 7.1, TEST 2: the key, and the signature of one byte, that the library gives."""
    key = Ed25519PrivateKey.from_private_bytes(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.public_key().public_bytes_raw().hex() == public
    assert key.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8f")


@given(st.text(max_size=5), Fields, st.text(max_size=5), Fields)
def test_no_two_lists_of_fields_are_one_statement(purpose, fields, other_purpose, other_fields) -> None:
    same = (purpose, fields) == (other_purpose, other_fields)
    assert (signing.statement(purpose, fields) == signing.statement(other_purpose, other_fields)) == same


def test_a_statement_by_hand() -> None:
    assert signing.statement("ab", [b"", b"c"]) == b"\0\0\0\0\0\0\0\2ab" + bytes(8) + b"\0\0\0\0\0\0\0\1c"


def test_a_signature_is_of_its_key_its_purpose_and_its_fields() -> None:
    fields = [b"run", b"7"]
    signature = signing.sign(KEY, signing.REPLY, fields)
    signing.verify(PUBLIC, signature, signing.REPLY, fields)
    stranger = Ed25519PrivateKey.generate().public_key()
    wrong: list[tuple[Ed25519PublicKey, bytes, str, list[bytes]]] = [
        (stranger, signature, signing.REPLY, fields),
        (PUBLIC, signature, signing.ROSTER, fields),
        (PUBLIC, signature, signing.REPLY, [b"run7"]),
        (PUBLIC, signature, signing.REPLY, [b"7", b"run"]),
        (PUBLIC, signature, signing.REPLY, []),
        (PUBLIC, signature[:-1], signing.REPLY, fields),
        (PUBLIC, b"", signing.REPLY, fields),
        (PUBLIC, signature[:-1] + bytes([signature[-1] ^ 1]), signing.REPLY, fields),
    ]
    for case in wrong:
        with pytest.raises(ProtocolError, match="signature"):
            signing.verify(*case)


def test_a_public_line_comes_back() -> None:
    line = signing.public_line(PUBLIC)
    assert signing.read_public_line(f"{line} St. Mary's, room 2") == PUBLIC


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 !!!",
        "ssh-foo AAAA",
        "é é",
        "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ==",
        "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBEmKSENjQEezOmxkZMy7opKgwFB9nkt5YRr"
        "YMjNuG5N87uRgg6CLrbo5wAdT/y6v0mKV0U2w0WZ2YB/++Tpockg=",
    ],
)
def test_what_is_no_ed25519_line(line: str) -> None:
    with pytest.raises(ProtocolError, match="key"):
        signing.read_public_line(line)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen to compare with")
def test_the_fingerprint_is_openssh_s(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(signing.public_line(PUBLIC) + " comment\n")
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "key.pub"], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[1] == signing.fingerprint(signing.public_line(PUBLIC))
