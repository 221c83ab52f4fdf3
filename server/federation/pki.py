"""The federation's own certificate authority, and the server certificate that it signs.

X.509 v3 (RFC 5280), ECDSA on P-256 with SHA-256.  The authority may sign server certificates only, and no other
authority; its key stays in the coordinator's folder, and sites get its certificate.  Keys are PKCS #8 PEM, mode 0600.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from chexfound.durable.files import replace_file
from chexfound.errors import ConfigError, DataError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # what browsers and operating systems accept at most
RENEW_DAYS = 30  # left, from which on `status` says to renew
EARLY = datetime.timedelta(hours=1)  # a site's clock may be a little behind


def make_authority(folder: Path, federation: str) -> None:
    """Write ca.key and ca.crt.

    Raises: ConfigError if there are any: a new authority would lock all sites out.
    """
    for file in ("ca.key", "ca.crt"):
        if (folder / file).exists():
            raise ConfigError(f"{folder / file}: is there already; a new authority would lock all sites out")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} CA"[:64])])
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_key(folder / "ca.key", key)
    _write(folder / "ca.crt", certificate)


def make_server(folder: Path, names: Sequence[str]) -> x509.Certificate:
    """Write server.key and server.crt (with the authority's behind it), in place of those that are there.

    Args:
        folder: holds the authority.
        names: host names and addresses by which the server is reached; loopback is added.

    Raises: ConfigError for a name that is none; DataError if the authority cannot be read or has expired.
    """
    authority = read_certificate(folder / "ca.crt")
    signer = _read_key(folder / "ca.key")
    if days_left(authority) <= 0:
        raise DataError(
            f"{folder / 'ca.crt'}: expired on {authority.not_valid_after_utc:%Y-%m-%d}; make a new federation"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = [_alternative(name) for name in dict.fromkeys([*names, "localhost", "127.0.0.1", "::1"])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    days = min(SERVER_DAYS, days_left(authority))
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    write_key(folder / "server.key", key)
    _write(folder / "server.crt", certificate, authority)
    return certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.split(".")
    if len(name) > 253 or not all(
        0 < len(part) < 64 and part.isascii() and part.replace("-", "a").isalnum() and part.strip("-") == part
        for part in labels
    ):
        raise ConfigError(f"{name!r}: neither a host name (letters, digits and hyphens, in ASCII) nor an IP address")
    return x509.DNSName(name)


def days_left(certificate: x509.Certificate) -> int:
    """Whole days until it expires; below 0 once it has."""
    return (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file.

    Raises: DataError.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no certificate can be read there ({error})") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no private key can be read there ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{path}: a key of another kind than ECDSA")
    return key


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """PKCS #8 PEM without a password, readable by its owner only, from its first byte on."""
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with replace_file(path, 0o600) as temporary:
        temporary.write_bytes(text)


def _write(path: Path, *certificates: x509.Certificate) -> None:
    with replace_file(path, 0o644) as temporary:
        temporary.write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates))
