"""The roster as the SuperLink has it: each site's node key registered, through Flower's own command line.

Flower lists nodes by number only, so the number that a site's key was given stands in DIR/nodes.json.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chexfound.errors import ConfigError, SiteError
from chexfound.journal import write_json
from chexfound.roster import Keys
from server.federation import CONNECTION, Federation

SECONDS = 60.0  # that one command may take


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
            _flower(federation, "unregister", number)
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


def _register(federation: Federation, name: str, keys: Keys) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.pub"
        path.write_text(keys.node + "\n", encoding="ascii")
        return str(_flower(federation, "register", str(path), "--name", name)["node-id"])


def _listed(federation: Federation) -> dict[str, Node]:
    """By number."""
    result = {}
    for one in _flower(federation, "list", "--verbose")["nodes"]:
        since = {"online": one["online-at"], "offline": one["offline-at"]}.get(one["status"], one["created-at"])
        result[str(one["node-id"])] = Node(str(one["node-id"]), one["status"], since)
    return result


def _flower(federation: Federation, *arguments: str) -> dict[str, Any]:
    """What a subcommand of `flwr supernode` says; it ends with 0 whatever happened."""
    command, *rest = arguments
    try:
        done = subprocess.run(  # noqa: S603 (our own arguments, no shell)
            ["flwr", "supernode", command, *rest[:1], CONNECTION, *rest[1:], "--format", "json"]  # noqa: S607
            if command != "list"
            else ["flwr", "supernode", "list", CONNECTION, *rest, "--format", "json"],  # noqa: S607
            env=federation.environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        values = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SiteError(f"flwr supernode {command}: no answer of the SuperLink at {federation.superlink}") from error
    except (OSError, ValueError) as error:
        raise SiteError(
            f"flwr supernode {command}: the SuperLink at {federation.superlink} cannot be asked; is it up "
            f"(chexfound-server up {federation.folder})? {_last(done.stderr) if 'done' in locals() else error}"
        ) from error
    if not isinstance(values, dict) or not values.get("success"):
        said = str(values.get("error-message", "")) if isinstance(values, dict) else ""
        raise SiteError(f"flwr supernode {command}: refused by the SuperLink at {federation.superlink}: {_last(said)}")
    return values


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


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
