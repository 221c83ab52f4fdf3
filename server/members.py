"""The roster as the SuperLink has it: each site's node key registered, through Flower's own command line.

Flower lists nodes by number only, so the number that a site's key was given stands in DIR/nodes.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.errors import ConfigError
from chexfound.journal import write_json
from chexfound.roster import Keys
from chexfound.signing import fingerprint
from server import flower
from server.federation import CONNECTION, Federation


@dataclass(frozen=True)
class Node:
    """A site's node as the SuperLink has it; `status` is registered, online, offline …, `since` when that began."""

    id: str
    status: str
    since: str


def register_all(federation: Federation) -> tuple[list[str], list[str]]:
    """Make the SuperLink's nodes those of the roster; returns the sites that were registered, and those struck off.

    Raises: SiteError if the SuperLink does not answer or refuses.
    """
    sites, numbers = federation.sites().sites, _numbers(federation)
    known = _listed(federation)
    struck = [name for name, (number, node) in numbers.items() if name not in sites or sites[name].node != node]
    for name in struck:
        number, _ = numbers.pop(name)
        if number in known and known[number].status != "unregistered":
            flower.ask(federation, ["supernode", "unregister", number, CONNECTION])
        _write(federation, numbers)
    new = [name for name in sites if name not in numbers or numbers[name][0] not in known]
    for name in new:
        numbers[name] = (_register(federation, name, sites[name]), sites[name].node)
        _write(federation, numbers)
    return new, struck


def nodes(federation: Federation) -> dict[str, Node]:
    """The nodes of the roster's sites, by name; a site that the SuperLink does not know yet is left out.

    Raises: SiteError.
    """
    known = _listed(federation)
    return {name: known[number] for name, (number, _) in _numbers(federation).items() if number in known}


def rows(federation: Federation, nodes: Mapping[str, Node]) -> list[dict[str, Any]]:
    """The sites as --json has them: fingerprints, and whether they are connected."""
    return [
        {
            "site": name,
            "node": fingerprint(keys.node),
            "identity": fingerprint(keys.identity),
            "status": nodes[name].status if name in nodes else "unknown",
            "since": nodes[name].since if name in nodes and nodes[name].since != "N/A" else None,
        }
        for name, keys in sorted(federation.sites().sites.items())
    ]


def _register(federation: Federation, name: str, keys: Keys) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.pub"
        path.write_text(keys.node + "\n", encoding="ascii")
        command = ["supernode", "register", str(path), CONNECTION, "--name", name]
        return str(flower.ask(federation, command)["node-id"])


def _listed(federation: Federation) -> dict[str, Node]:
    """By number."""
    result = {}
    for one in flower.ask(federation, ["supernode", "list", CONNECTION, "--verbose"])["nodes"]:
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
