"""The roster of a federation: names and public keys, as the coordinator keeps and every site approves them.

A site's two keys: a NIST elliptic-curve key, by which Flower authenticates its node, and an Ed25519 identity key, with
which it signs what it says.  Both are told as OpenSSH writes public keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chexfound.durable.files import canonical
from chexfound.errors import ConfigError, ProtocolError
from chexfound.identity import signing
from chexfound.parsing import strict_json

FORMAT = 1
SIZE_MAX = 2**20  # bytes of a file from outside


@dataclass(frozen=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine by its very name; a name that is looked up elsewhere is not."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @staticmethod
    def parse(text: str, what: str) -> Address:
        """Host and port of "HOST:PORT" ("[ADDRESS]:PORT" for IPv6).

        Raises: ConfigError, which calls it `what`.
        """
        host, colon, port = text.rpartition(":")
        if "://" in text or not colon:
            raise ConfigError(f"{what} {text!r}: write HOST:PORT without a prefix, for example 127.0.0.1:8000")
        bare = host.removeprefix("[").removesuffix("]")
        if not bare or "/" in host or any(character.isspace() for character in host) or (":" in bare and bare == host):
            raise ConfigError(f"{what} {text!r}: {host!r} is not a host name or an address ([ADDRESS]:PORT for IPv6)")
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"{what} {text!r}: {port!r} is not a port (1 to 65535)")
        return Address(bare, int(port))


@dataclass(frozen=True)
class Keys:
    """A site's public keys, each a line without a comment."""

    node: str
    identity: str


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The sites of a federation, by name.

    Args:
        federation: its name.
        serial: how often it was changed.
        sites: keys by site, names in order.
    """

    federation: str
    serial: int
    sites: Mapping[str, Keys] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give the roster as plain JSON values, as it is written and hashed."""
        sites = {name: {"node": keys.node, "identity": keys.identity} for name, keys in sorted(self.sites.items())}
        return {"format": FORMAT, "federation": self.federation, "serial": self.serial, "sites": sites}

    def sha256(self) -> str:
        """By which coordinator and sites know that they mean the same sites; hex."""
        return hashlib.sha256(canonical(self.as_dict())).hexdigest()

    def with_site(self, name: str, keys: Keys) -> Roster:
        """One more site.

        Raises: ConfigError if its name or one of its keys is taken.
        """
        check_name(name, "site name")
        if name in self.sites:
            raise ConfigError(f"site {name!r} is in the federation already; remove it first to give it new keys")
        for other, taken in self.sites.items():
            if taken.node == keys.node or taken.identity == keys.identity:
                raise ConfigError(
                    f"a key of {name!r} is that of {other!r}; each site makes its own with chexfound-client enrol"
                )
        return Roster(federation=self.federation, serial=self.serial + 1, sites={**self.sites, name: keys})

    def without_site(self, name: str) -> Roster:
        """One site less.

        Raises: ConfigError if there is none of that name.
        """
        if name not in self.sites:
            raise ConfigError(f"there is no site {name!r}; there are {', '.join(sorted(self.sites)) or 'none'}")
        sites = {other: keys for other, keys in self.sites.items() if other != name}
        return Roster(federation=self.federation, serial=self.serial + 1, sites=sites)


def check_name(name: str, what: str) -> None:
    """Raise ConfigError unless a name can name a folder, a file and a line of a log."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name) > 64:
        raise ConfigError(f"{what} {name!r}: use 1 to 64 printable characters and no slash")


def public_file(name: str, keys: Keys) -> str:
    """SITE.pub: what a site gives the coordinator."""
    return f"{keys.node} {name}\n{keys.identity} {name}\n"


def read_public_file(text: str, where: str, name: str | None = None) -> Keys:
    """The keys of a SITE.pub.

    Raises: ConfigError, also if the file says that it is of another site than `name`.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) != 2:
        raise ConfigError(f"{where}: {len(lines)} lines where the two of chexfound-client enrol belong")
    node, identity = (" ".join(words[:2]) for words in lines)
    for comment in (" ".join(words[2:]) for words in lines):
        if name is not None and comment and comment != " ".join(name.split()):
            raise ConfigError(f"{where} is of site {comment!r}, not {name!r}")
    return _checked(node, identity, where)


def _checked(node: str, identity: str, where: str) -> Keys:
    try:
        key = serialization.load_ssh_public_key(node.encode("ascii"))
        signing.read_public_line(identity)
    except (ValueError, UnsupportedAlgorithm, ProtocolError) as error:
        raise ConfigError(f"{where}: not the keys of chexfound-client enrol ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{where}: the node's key is not one of a NIST elliptic curve, and Flower takes no other")
    return Keys(node, identity)


def invitation(name: str, public: Address, authority: str, sites: Roster) -> dict[str, Any]:
    """Give what goes to every site: where the federation is, whose certificates to believe, and who is in it."""
    return {"format": FORMAT, "name": name, "server": str(public), "ca": authority, "roster": sites.as_dict()}


def load(path: Path) -> Roster:
    """A roster's file.

    Raises: ConfigError.
    """
    return parse(read_json(path), str(path))


def read_json(path: Path, expected: str | None = None) -> Any:
    """The value of a small JSON file from outside.

    Args:
        path: of the file.
        expected: what it ought to be, to be told of one that is no JSON.

    Raises: ConfigError.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(SIZE_MAX + 1)
        if len(text) > SIZE_MAX:
            raise ValueError(f"larger than {SIZE_MAX} bytes")
        return strict_json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if expected is not None and not isinstance(error, OSError):
            raise ConfigError(f"{path}: is not {expected}") from error
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def parse(values: Any, where: str) -> Roster:
    """A roster from outside.

    Raises: ConfigError.
    """
    if not isinstance(values, dict) or set(values) != {"format", "federation", "serial", "sites"}:
        raise ConfigError(f"{where}: not a roster")
    federation, serial, sites = values["federation"], values["serial"], values["sites"]
    if values["format"] != FORMAT:
        raise ConfigError(f"{where}: a roster of format {values['format']!r}; this release reads {FORMAT}")
    if not isinstance(federation, str) or type(serial) is not int or serial < 0 or not isinstance(sites, dict):
        raise ConfigError(f"{where}: not a roster")
    result = Roster(federation=federation, serial=0)
    check_name(federation, f"{where}: federation")
    for name, keys in sites.items():
        if (
            not isinstance(keys, dict)
            or set(keys) != {"node", "identity"}
            or not all(isinstance(k, str) for k in keys.values())
        ):
            raise ConfigError(f"{where}: site {name!r} has not the two keys")
        result = result.with_site(name, _checked(keys["node"], keys["identity"], f"{where}: site {name!r}"))
    return Roster(federation=federation, serial=serial, sites=result.sites)
