"""The roster as the SuperLink has it: each site's node key registered, through Flower's own command line.

Flower lists nodes by number only, so the number that a site's key was given stands in DIR/nodes.json. A key that it has
unregistered it never takes again, so those of the sites that were struck off stand in DIR/struck.json.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.durable.files import write_json
from chexfound.errors import ConfigError, SiteError
from chexfound.identity import roster
from chexfound.identity.roster import Keys
from chexfound.identity.signing import fingerprint
from server.federation import flower_cli
from server.federation.settings import CONNECTION, Federation


@dataclass(frozen=True)
class Node:
    """A site's node as the SuperLink has it; `status` is registered, online, offline …, `since` when that began."""

    id: str
    status: str
    since: str


def admit(federation: Federation, name: str, keys: Keys) -> None:
    """Take a site into the roster.

    Raises: ConfigError if its name or a key of it is taken, or if a key of it was struck off.
    """
    sites = federation.sites().with_site(name, keys)
    if {keys.node, keys.identity} & _struck(federation):
        raise ConfigError(f"a key of {name!r} was struck off and may not come back; {_anew(name)}")
    federation.write_sites(sites)


def strike(federation: Federation, name: str) -> None:
    """Take a site out of the roster, and its keys for good.

    Raises: ConfigError if there is none of that name.
    """
    sites = federation.sites()
    left = sites.without_site(name)
    gone = _struck(federation) | {sites.sites[name].node, sites.sites[name].identity}
    write_json(federation.path("struck.json"), sorted(gone))  # first: killed here, it is struck off when asked again
    federation.write_sites(left)


def _struck(federation: Federation) -> set[str]:
    """The keys of all sites that were struck off."""
    path = federation.path("struck.json")
    if not path.exists():
        return set()
    values = roster.read_json(path)
    if not isinstance(values, list) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: damaged; bring it back from a backup: it holds the keys that may not come back")
    return set(values)


def _anew(name: str) -> str:
    return (
        f"at the site: move HOME/keys away (HOME is ~/.chexfound/sites/{name}, or sites/{name} of $CHEXFOUND_HOME), "
        f"chexfound-client enrol --name {shlex.quote(name)} anew, and send the new file"
    )


def register_all(federation: Federation) -> tuple[list[str], list[str], dict[str, str]]:
    """Make the SuperLink's nodes those of the roster, as far as it takes them.

    Returns: the sites that were registered, those struck off, and those that it did not take, with why and what to do.

    Raises: SiteError if the SuperLink does not answer, or does not strike a site off.
    """
    sites, numbers = federation.sites().sites, _numbers(federation)
    known = _listed(federation)
    struck = [name for name, (number, node) in numbers.items() if name not in sites or sites[name].node != node]
    for name in struck:
        number, _ = numbers.pop(name)
        if number in known and known[number].status != "unregistered":
            flower_cli.ask(federation, ["supernode", "unregister", number, CONNECTION])
        _write(federation, numbers)
    new = [name for name in sites if name not in numbers or numbers[name][0] not in known]
    refused: dict[str, str] = {}
    for name in new:
        try:
            numbers[name] = (_register(federation, name, sites[name]), sites[name].node)
        except SiteError as error:  # one that it does not take keeps no other out
            remove = f"chexfound-server remove-site {shlex.quote(str(federation.folder))} {shlex.quote(name)}"
            refused[name] = f"{error}\nif its key was in use before: {remove}; {_anew(name)}"
            continue
        _write(federation, numbers)
    return [name for name in new if name not in refused], struck, refused


def nodes(federation: Federation) -> dict[str, Node]:
    """The nodes of the roster's sites, by name; a site that the SuperLink does not know yet is left out.

    Raises: SiteError.
    """
    known = _listed(federation)
    return {name: known[number] for name, (number, _) in _numbers(federation).items() if number in known}


def rows(federation: Federation, nodes: Mapping[str, Node] | None) -> list[dict[str, Any]]:
    """The sites as --json has them: fingerprints, and whether they are connected.

    Args:
        federation: whose.
        nodes: as the SuperLink has them; None if it could not be asked.
    """
    other = "unknown" if nodes is None else "unregistered"
    nodes = nodes or {}
    return [
        {
            "site": name,
            "node": fingerprint(keys.node),
            "identity": fingerprint(keys.identity),
            "status": nodes[name].status if name in nodes else other,
            "since": nodes[name].since if name in nodes and nodes[name].since != "N/A" else None,
        }
        for name, keys in sorted(federation.sites().sites.items())
    ]


def called(status: str) -> str:
    """A row's status, for people."""
    if status == "unregistered":
        return "not registered at the SuperLink: chexfound-server add-site again, or up"
    return status


def _register(federation: Federation, name: str, keys: Keys) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.pub"
        path.write_text(keys.node + "\n", encoding="ascii")
        command = ["supernode", "register", str(path), CONNECTION, "--name", name]
        return str(flower_cli.ask(federation, command)["node-id"])


def _listed(federation: Federation) -> dict[str, Node]:
    """By number."""
    result = {}
    for one in flower_cli.ask(federation, ["supernode", "list", CONNECTION, "--verbose"])["nodes"]:
        since = {"online": one["online-at"], "offline": one["offline-at"]}.get(one["status"], one["created-at"])
        result[str(one["node-id"])] = Node(str(one["node-id"]), one["status"], since)
    return result


def _numbers(federation: Federation) -> dict[str, tuple[str, str]]:
    """Number and node key of each site that was registered."""
    path = federation.path("nodes.json")
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): (str(one["id"]), str(one["node"])) for name, one in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it, and the sites are registered anew") from error


def _write(federation: Federation, numbers: dict[str, tuple[str, str]]) -> None:
    write_json(
        federation.path("nodes.json"), {name: {"id": id_, "node": node} for name, (id_, node) in numbers.items()}
    )
