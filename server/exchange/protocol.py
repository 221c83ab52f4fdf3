"""A run's need of its sites, and who they are; how requests reach a lone one (server/exchange/grid.py: several)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import chexfound
from chexfound.contract import cells
from chexfound.contract.limits import Limits, judge, refusal, refused
from chexfound.contract.request import COUNTS, Reply, Request
from chexfound.errors import ChexfoundError, ConfigError, ProtocolError, VersionError
from chexfound.parsing import values as wire_values
from chexfound.parsing.names import is_name
from chexfound.recipe.schema import Recipe
from chexfound.wire import envelopes

ABOUT = {"site", "versions", "findings", "cells", "withheld"}  # whatever the aggregation
ENROLMENT = ABOUT | {*COUNTS, "store_hmac"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as the roster has it: its name, and what it said of itself when it enrolled."""

    name: str
    values: dict[str, Any]
    limits: Limits | None = None  # what its policy grants; None of one that has none, in a simulation


@dataclass(frozen=True, kw_only=True)
class Missing:
    """In place of a reply that did not come, or does not count.

    Args:
        reason: late, gone, or the code of an error (chexfound/errors.py).
        error: what a run ends with that cannot do without this site.
    """

    reason: str
    error: ChexfoundError


class Exchange(Protocol):
    """Hold what a run needs of its sites."""

    def enrol(self, recipe: Recipe, before: Sequence[Member] = ()) -> list[Member]:
        """The sites, sorted by name; of a run that goes on, those that it began with."""

    def ask(
        self, requests: Sequence[Request | None], timeout_s: float | None = None
    ) -> Iterator[Reply | Missing | None]:
        """Send one request to each site, or none; what comes of it in the order of the sites, one at a time."""


def checked_roster(
    replies: Sequence[Reply], senders: Sequence[str], recipe: Recipe, n_sites: int | None = None
) -> list[Member]:
    """Sort the enrolled by name; `senders` is what they are called until they have one.

    Args:
        replies: to `enrol`.
        senders: of each.
        recipe: of the run; under secure aggregation sites tell no counts but the names of their findings.
        n_sites: of the federation, where it has a roster.

    Raises: ProtocolError for a reply that is not an enrolment; ConfigError for a name taken twice; RefusedError for a
        site whose policy refuses the recipe.
    """
    n_sites = n_sites or max(len(replies), recipe.federation.min_sites)
    members = [_checked(reply.values, sender, recipe, n_sites) for reply, sender in zip(replies, senders, strict=True)]
    members.sort(key=lambda member: member.name)
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two sites call themselves {twice[0]!r}; give each its own --name")
    return members


def _checked(values: dict[str, Any], sender: str, recipe: Recipe, n_sites: int) -> Member:
    """An enrolment, of a site whose policy grants the recipe; that comes first: such a site tells nothing else."""
    limits = None
    if "policy" in values:
        values = dict(values)
        limits = Limits.parse(values.pop("policy"), f"{sender}: its policy")
        if against := refused(judge(recipe, limits, n_sites)):
            raise refusal(_name(values, sender), against)
    member = _checked_name(values, sender) if recipe.aggregation == "secagg" else _checked_member(values, sender)
    return replace(member, limits=limits)


def _name(values: dict[str, Any], sender: str) -> str:
    name = values.get("site")
    if not isinstance(name, str) or not is_name(name):
        raise ProtocolError(f"{sender} enrolled without a usable name")
    return name


def _checked_member(values: dict[str, Any], sender: str) -> Member:
    name, findings, built = _name(values, sender), values.get("findings"), values.get("versions")
    if set(values) != ENROLMENT or not all(_told(values[key]) for key in COUNTS):
        raise ProtocolError(f"site {name!r} enrolled without its counts")
    _check_about(name, values)
    _check_counts(name, values)
    if not isinstance(findings, dict) or not all(
        is_name(finding)
        and isinstance(both, dict)
        and set(both) == {"positives", "negatives"}
        and _both_told(both, values)
        for finding, both in findings.items()
    ):
        raise ProtocolError(f"site {name!r} enrolled without usable counts of its findings")
    _check_versions(name, built)
    if not isinstance(values["store_hmac"], str) or not re.fullmatch("[0-9a-f]{64}", values["store_hmac"]):
        raise ProtocolError(f"site {name!r} enrolled without its store's hash")
    return Member(name=name, values=values)


def _checked_name(values: dict[str, Any], sender: str) -> Member:
    name, findings = _name(values, sender), values.get("findings")
    if set(values) != ABOUT:
        raise ProtocolError(f"site {name!r} enrolled with other values than secure aggregation asks for")
    _check_about(name, values)
    if not isinstance(findings, list) or not all(map(is_name, findings)):
        raise ProtocolError(f"site {name!r} enrolled without usable names of its findings")
    _check_versions(name, values["versions"])
    return Member(name=name, values=values)


def _told(value: object) -> bool:
    """A count, or the word for one that its site does not tell, and nothing else."""
    return wire_values.count(value) or value == cells.SUPPRESSED


def _check_about(name: str, values: dict[str, Any]) -> None:
    """Check what a site says it withholds, and below how many patients, and that its findings fit into a request."""
    if not isinstance(values["withheld"], bool) or not wire_values.count(values["cells"]):
        raise ProtocolError(f"site {name!r} enrolled without saying what it tells and what not")
    if isinstance(values["findings"], dict | list) and len(values["findings"]) > envelopes.FINDINGS_MAX:
        raise ProtocolError(
            f"site {name!r} enrolled with {len(values['findings'])} findings; {envelopes.FINDINGS_MAX} are the most"
        )


def _check_counts(name: str, values: dict[str, Any]) -> None:
    """Check that a site's totals are those of its parts; not told exactly where one of those is not."""
    images, patients, *parts = (values[key] for key in COUNTS)
    small = cells.SUPPRESSED in parts
    if (small and not values["cells"]) or any((total == cells.SUPPRESSED) != small for total in (images, patients)):
        raise ProtocolError(f"site {name!r} enrolled without its totals suppressed exactly where one of their parts is")
    if not small and (sum(parts) != images or patients > images):
        train, val, test = parts
        raise ProtocolError(
            f"site {name!r} enrolled without counts that add up: {images} images of {patients} patients, "
            f"{train} + {val} + {test} for training, validation and test"
        )


def _both_told(both: dict[str, Any], values: dict[str, Any]) -> bool:
    """Two counts of training images that may be told, or neither."""
    train, least = values["train"], values["cells"]
    if least and set(both.values()) == {cells.SUPPRESSED}:
        return True
    if train == cells.SUPPRESSED or not all(map(wire_values.count, both.values())):
        return False
    return bool(0 < sum(both.values()) <= train and min(both.values()) >= least)


def _check_versions(name: str, built: Any) -> None:
    if not isinstance(built, dict) or not all(is_name(part) for pair in built.items() for part in pair):
        raise ProtocolError(f"site {name!r} enrolled without its versions")
    if built.get("chexfound") != chexfound.__version__:
        raise VersionError(
            f"site {name!r} runs federated CheXFound {built.get('chexfound')!r}, the coordinator "
            f"{chexfound.__version__}; install the same release at both ends"
        )
