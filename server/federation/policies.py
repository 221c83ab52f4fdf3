"""Grants of the sites, as each said when it enrolled last: a run that one will refuse is refused here, at once.

    DIR/policies/SITE.json    the limits of its site.yaml, and when it told them

It is a memory and no rule: what counts is what the site says when it is asked.
"""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path

from chexfound.contract.limits import Limits, judge, refusal, refused
from chexfound.durable.files import storage, write_json
from chexfound.errors import ConfigError, ProtocolError, RefusedError
from chexfound.identity.roster import read_json
from chexfound.recipe.schema import Recipe
from server.federation.settings import Federation


def keep(folder: Path, site: str, limits: Limits) -> None:
    """Remember what a site of the roster grants.

    Raises: StorageError.
    """
    path = folder / "policies" / f"{site}.json"
    with storage(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {"at": at, "policy": limits.as_dict()})


def check(federation: Federation, recipe: Recipe) -> None:
    """Check that no site of the federation, by what it said last, refuses a recipe.

    Raises: RefusedError that says whose site.yaml, which line, what was asked, and what to do.
    """
    sites = federation.sites().sites
    for name in sorted(sites):
        path = federation.path("policies") / f"{name}.json"
        try:
            values = read_json(path)
            limits, at = Limits.parse(values["policy"], str(path)), str(values["at"])
        except (ConfigError, ProtocolError, KeyError, TypeError):  # none yet, or of another release: the site will say
            continue
        if against := refused(judge(recipe, limits, len(sites))):
            error = refusal(name, against)
            raise RefusedError(
                error.code,
                f"{error}; it said so on {at[:10]}, and nobody was asked now. Change the recipe, or ask its operator "
                f"to change that line; once that is done: rm {shlex.quote(str(path))}, and run again",
            )
