"""`chexfound-client join FILE`: who is in the federation, which code, which policy; one question, and it is in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

import chexfound
from chexfound.errors import ConfigError, PolicyError
from chexfound.identity.signing import fingerprint
from chexfound.parsing.names import counted
from chexfound.secagg.parameters import MINIMUM
from client.home import approval, membership
from client.home.membership import ApprovedFederation
from client.home.paths import named, site_home
from client.home.policy import Policy

QUESTION = "Are these the fingerprints that they told you, and may runs have this code, under this policy?"


def run(given: argparse.Namespace) -> int:
    """Show all, ask, approve."""
    from client.node.flwr_private import release_bundle

    name, home, federation, before = admissible(given)
    policy, release = Policy.load(home), release_bundle()
    tell(federation, name)
    tell_changes(before, federation)
    print(f"code {release.digest()}")
    print(f"  of the installed release {chexfound.__version__}, which is what runs here whatever a run ships")
    for digest, came in approval.refused(home).items():
        differing = counted(len(came.differences(release)), "other file")
        print(f"  refused before, and not approved by this: {digest[:12]}…, with {differing};")
        print(f"    look at it: chexfound-client approve {digest[:12]}{named(name)}")
    print("\n".join(policy_lines(policy, len(federation.sites.sites), home / "site.yaml")))
    consent(given, QUESTION)
    membership.approve(home, federation)
    approval.approve(home, release.digest())
    serving = f"; next: chexfound-client --data DIR{named(name)}" if before is None else ""
    print(f"approved: this site is in, and runs with this code are accepted{serving}")
    return 0


def admissible(given: argparse.Namespace) -> tuple[str, Path, ApprovedFederation, ApprovedFederation | None]:
    """The site, its home, the federation of the file that its operator was sent, and the one approved before.

    Raises: ConfigError if the file is not one, not of this site, or older than what was approved.
    """
    name = given.site
    home, federation = site_home(name), membership.read(given.file)
    membership.check_own(name, membership.public_keys(home), federation, str(given.file))
    before = membership.approved(home)
    if before is not None and before.name == federation.name and before.sites.serial > federation.sites.serial:
        raise ConfigError(
            f"{given.file}: older (serial {federation.sites.serial}) than what was approved ({before.sites.serial}); "
            "ask the coordinator for the present one"
        )
    return name, home, federation, before


def tell(federation: ApprovedFederation, own: str) -> None:
    """Show who is in it."""
    print(f"federation {federation.name} at {federation.server}, roster {federation.sites.serial}")
    print(f"  authority {federation.authority_fingerprint}")
    for name, keys in sorted(federation.sites.sites.items()):
        print(f"  {name}{' (this site)' if name == own else ''}: {fingerprint(keys.identity)}")
    if len(federation.sites.sites) < MINIMUM:
        print(f"  fewer than {MINIMUM} sites: no sum is masked, so the coordinator sees this site's own update")


def tell_changes(before: ApprovedFederation | None, after: ApprovedFederation) -> None:
    """Show what is new in it."""
    for change in membership.changes(before, after):
        print(f"  change: {change}")


def consent(given: argparse.Namespace, question: str, done: str = "approved") -> None:
    """Ask, unless `--yes` was given.

    Raises: PolicyError for any answer but yes; ConfigError where there is nobody to ask.
    """
    if not given.yes and not confirmed(question):
        raise PolicyError(f"not {done}; nothing was changed")


def confirmed(question: str) -> bool:
    """Ask; only the whole word is a yes.

    Raises: ConfigError where there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on; look at what is above, then give --yes")
    return input(f"{question} [yes/no] ").strip().lower() == "yes"


def policy_lines(policy: Policy, sites: int, path: Path) -> list[str]:
    """Give what the site demands, a line each; `*`: another value than the default."""
    said = [f"policy {path if path.exists() else f'the defaults ({path} is not there)'}"]
    taken = "refused" if policy.masked(sites) else "accepted"
    said.append(f"  runs in the clear are {taken}, with {counted(sites, 'site')}")
    defaults = dict(_flat(_as_dict(Policy())))
    for key, value in _flat(_as_dict(policy)):
        said.append(f"{'*' if value != defaults[key] else ' ':>3} {key:<26} {_shown(value)}")
    return said


def _as_dict(policy: Policy) -> dict[str, Any]:
    values: dict[str, Any] = TypeAdapter(Policy).dump_python(policy)
    return values


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _shown(value: Any) -> str:
    """Give a value as it may stand in site.yaml."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
