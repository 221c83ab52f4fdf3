"""A site's own keys, and the federation that its operator approved.

    HOME/keys/node.key        by which Flower authenticates the site's node (ECDSA on P-384, OpenSSH's format)
    HOME/keys/identity.key    by which the site signs what it says (Ed25519, PKCS #8)
    HOME/federation.json      the file of the coordinator, as it was approved
    HOME/ca.crt               the authority in it

Both keys are made here, have mode 0600 and never leave.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.durable.files import replace_file, storage, write_json, write_text
from chexfound.errors import ConfigError, DataError, RosterError
from chexfound.identity import roster, signing
from chexfound.identity.roster import Address, Keys, Roster


def make_keys(home: Path) -> tuple[Keys, bool]:
    """The site's public keys, each made if it is not there yet; and whether any was.

    Raises: DataError if there are some that cannot be read.
    """
    node, identity = home / "keys" / "node.key", home / "keys" / "identity.key"
    with storage(node):
        node.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(node.parent, 0o700)
        made = not identity.exists() or not node.exists()  # one alone: it was killed between the two, or one was lost
        if not identity.exists():
            _write(identity, Ed25519PrivateKey.generate(), serialization.PrivateFormat.PKCS8)
        if not node.exists():
            _write(node, ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)
    return public_keys(home), made


def _write(path: Path, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with replace_file(path, 0o600) as temporary:
        temporary.write_bytes(text)


def public_keys(home: Path) -> Keys:
    """The public halves of the site's keys.

    Raises: DataError.
    """
    line = node_key(home).public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Keys(line.decode("ascii"), signing.public_line(identity_key(home).public_key()))


def node_key(home: Path) -> ec.EllipticCurvePrivateKey:
    """The key that Flower knows the site's node by.

    Raises: DataError.
    """
    path = home / "keys" / "node.key"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: the node's key cannot be read ({error}); chexfound-client enrol makes one") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{path}: not a key of a NIST elliptic curve")
    return key


def identity_key(home: Path) -> Ed25519PrivateKey:
    """The key that the site signs with.

    Raises: DataError.
    """
    path = home / "keys" / "identity.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: the identity key cannot be read ({error}); chexfound-client enrol makes one"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path}: not an Ed25519 key")
    return key


@dataclass(frozen=True, kw_only=True)
class ApprovedFederation:
    """Hold what the coordinator's file says.

    Args:
        name: of the federation.
        server: where to connect.
        authority: PEM of the certificate that signs the server's.
        sites: who is in it.
    """

    name: str
    server: Address
    authority: str
    sites: Roster

    @property
    def authority_fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex, as `openssl x509 -fingerprint -sha256` shows it but for the colons."""
        return _certificate(self.authority, "ca").fingerprint(hashes.SHA256()).hex()


def _certificate(text: str, where: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(text.encode("ascii"))
    except ValueError as error:
        raise ConfigError(f"{where}: its ca is not a certificate in PEM ({error})") from error


def read(path: Path) -> ApprovedFederation:
    """The coordinator's file, or one that was approved.

    Raises: ConfigError.
    """
    values = roster.read_json(path, "a NAME.federation.json of chexfound-server")
    keys = {"format", "name", "server", "ca", "roster"}
    if (
        not isinstance(values, dict)
        or set(values) != keys
        or not all(isinstance(values[key], str) for key in ("name", "server", "ca"))
    ):
        raise ConfigError(f"{path}: is not a NAME.federation.json of chexfound-server")
    if values["format"] != roster.FORMAT:
        raise ConfigError(f"{path}: of format {values['format']!r}; this release reads {roster.FORMAT}")
    _certificate(values["ca"], str(path))
    sites = roster.parse(values["roster"], str(path))
    if sites.federation != values["name"]:
        raise ConfigError(f"{path}: its roster is that of another federation, {sites.federation!r}")
    server = Address.parse(values["server"], f"{path}: server")
    return ApprovedFederation(name=values["name"], server=server, authority=values["ca"], sites=sites)


def approved(home: Path) -> ApprovedFederation | None:
    """Give what the site's operator approved last; None before the first time."""
    path = home / "federation.json"
    return read(path) if path.exists() else None


def present(home: Path) -> ApprovedFederation:
    """Give the federation that the site's operator approved last, for a site that must be in one.

    Raises: ConfigError.
    """
    federation = approved(home)
    if federation is None:
        raise ConfigError(f"{home}: no federation was approved yet; chexfound-client join FILE")
    return federation


def approve(home: Path, federation: ApprovedFederation) -> None:
    """From now on the site connects there, in this company."""
    values = roster.invitation(federation.name, federation.server, federation.authority, federation.sites)
    write_json(home / "federation.json", values)
    authority_file(home, federation)


def authority_file(home: Path, federation: ApprovedFederation) -> Path:
    """HOME/ca.crt, which Flower reads: as in what was approved, whatever it was; that is one file, and whole."""
    path = home / "ca.crt"
    if not path.is_file() or path.read_bytes() != federation.authority.encode():
        write_text(path, federation.authority)
    return path


def check_own(name: str, keys: Keys, federation: ApprovedFederation, where: str) -> None:
    """Raise ConfigError unless the roster has this site, with the keys that it holds."""
    sites = federation.sites.sites
    if name not in sites:
        near = difflib.get_close_matches(name, sites, n=1)
        raise ConfigError(
            f"{where}: the federation {federation.name!r} has no site {name!r}"
            + (f" (it has {near[0]!r})" if near else "")
            + "; give the coordinator this site's .pub file, and take the new file that comes back"
        )
    if sites[name] != keys:
        raise ConfigError(
            f"{where}: has other keys for {name!r} than this site holds "
            f"({signing.fingerprint(sites[name].identity)} there, {signing.fingerprint(keys.identity)} here); "
            "give the coordinator the .pub file that chexfound-client enrol makes now"
        )


def changes(before: ApprovedFederation | None, after: ApprovedFederation) -> list[str]:
    """Give what would be new if this were approved; nothing if it is what was."""
    if before is None:
        return []
    said = []
    if before.server != after.server:
        said.append(f"the coordinator is at {after.server}, not at {before.server} any more")
    if before.authority_fingerprint != after.authority_fingerprint:
        said.append("the certificate authority is ANOTHER ONE: ask the coordinator why, in person")
    old, new = before.sites.sites, after.sites.sites
    said += [f"new site {name}" for name in sorted(set(new) - set(old))]
    said += [f"site {name} is gone" for name in sorted(set(old) - set(new))]
    said += [f"site {name} has OTHER KEYS" for name in sorted(set(new) & set(old)) if new[name] != old[name]]
    return said


def check_terms(sites: roster.Roster | None, federation: ApprovedFederation) -> None:
    """Hold the sites that the coordinator names against those that were approved: any of these, and no other.

    Raises: RosterError.
    """
    if sites is None:
        raise RosterError("the coordinator does not say who is in the federation")
    if sites.federation != federation.name:
        raise RosterError(f"the coordinator names another federation, {sites.federation!r}")
    approved_sites = federation.sites.sites
    for name, keys in sites.sites.items():
        if approved_sites.get(name) != keys:
            raise RosterError(
                f"the coordinator's federation has a site {name!r} that was not approved here, or not with its present "
                "keys; ask for the present file, then: chexfound-client join FILE"
            )


def check_equal(sites: roster.Roster | None, federation: ApprovedFederation | None) -> None:
    """Hold a roster against the approved one for a sum under masks, whose safety is counted in sites: no fewer.

    Raises: RosterError.
    """
    if federation is None:
        raise RosterError("this site has no keys and no roster: it cannot take part in secure aggregation")
    check_terms(sites, federation)
    if sites is None or sites.sites != federation.sites.sites:
        gone = sorted(set(federation.sites.sites) - set(sites.sites if sites else ()))
        raise RosterError(
            f"the coordinator's federation is without {', '.join(gone)}, which this site approved; under secure "
            "aggregation both must be the same: ask for the present file, then: chexfound-client join FILE"
        )
