from __future__ import annotations

import datetime
import ipaddress
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from chexfound.errors import ConfigError, DataError
from server.federation import pki


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pki.make_authority(tmp_path, "thorax")
    pki.make_server(tmp_path, ["coordinator.example.org", "192.0.2.7"])
    return tmp_path


def verified(folder: Path, name: x509.GeneralName, *, days: int = 0) -> None:
    """As a site's TLS library checks it (RFC 5280, CA/B profile)."""
    authority = pki.read_certificate(folder / "ca.crt")
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    builder = PolicyBuilder().store(Store([authority])).time(when.replace(tzinfo=None))
    builder.build_server_verifier(name).verify(pki.read_certificate(folder / "server.crt"), [])


def test_a_site_that_trusts_the_authority_accepts_the_server(folder: Path) -> None:
    for name in ("coordinator.example.org", "localhost"):
        verified(folder, x509.DNSName(name))
    for address in ("192.0.2.7", "127.0.0.1", "::1"):
        verified(folder, x509.IPAddress(ipaddress.ip_address(address)))
    ssl.create_default_context(cafile=str(folder / "ca.crt"))
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.crt", folder / "server.key")


def test_not_for_another_name_nor_after_its_time(folder: Path) -> None:
    with pytest.raises(VerificationError):
        verified(folder, x509.DNSName("elsewhere.example.org"))
    verified(folder, x509.DNSName("localhost"), days=pki.SERVER_DAYS - 1)
    with pytest.raises(VerificationError):
        verified(folder, x509.DNSName("localhost"), days=pki.SERVER_DAYS + 1)


def test_another_authority_of_the_same_name_is_not_believed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pki.make_authority(other, "thorax")
    (folder / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    with pytest.raises(VerificationError):
        verified(folder, x509.DNSName("localhost"))


def test_the_authority_signs_servers_and_no_authority(folder: Path) -> None:
    authority = pki.read_certificate(folder / "ca.crt")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    server = pki.read_certificate(folder / "server.crt")
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert pki.days_left(authority) == pki.AUTHORITY_DAYS - 1
    assert pki.days_left(server) == pki.SERVER_DAYS - 1


def test_keys_are_their_owner_s_alone(folder: Path) -> None:
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    for name in ("ca.crt", "server.crt"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o644


def test_renewal_keeps_the_authority(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("ca.key", "ca.crt", "server.key", "server.crt")}
    pki.make_server(folder, ["coordinator.example.org"])
    after = {name: (folder / name).read_bytes() for name in before}
    assert {name for name in before if before[name] != after[name]} == {"server.key", "server.crt"}
    verified(folder, x509.DNSName("coordinator.example.org"))


def test_a_second_authority_is_refused(folder: Path) -> None:
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="lock all sites out"):
        pki.make_authority(folder, "thorax")
    assert (folder / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["", "a b", "-a", "a-", "a..b", "ü.example", "*.example", "a/b", "x" * 64, "https://a"]
)
def test_what_is_no_name(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name"):
        pki.make_server(folder, [name])


def test_files_that_are_none(folder: Path) -> None:
    (folder / "ca.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(DataError, match=r"ca\.key: no private key"):
        pki.make_server(folder, ["a"])
    other = rsa.generate_private_key(65537, 2048)
    (folder / "ca.key").write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(DataError, match="another kind"):
        pki.make_server(folder, ["a"])
    (folder / "ca.crt").unlink()
    with pytest.raises(DataError, match=r"ca\.crt: no certificate"):
        pki.make_server(folder, ["a"])


def test_an_authority_that_expired_signs_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pki, "days_left", lambda certificate: -1)
    with pytest.raises(DataError, match="expired"):
        pki.make_server(folder, ["a"])
