"""Keys for simulated sites: as `chexfound-client enrol` makes them, and approved at each as its operator would."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from chexfound.identity.roster import Address, Roster
from client.home import membership
from server.federation import pki

NAME = "simulation"


def give_keys(homes: Mapping[str, Path], folder: Path) -> Roster:
    """Make what is not there yet.

    Args:
        homes: of the sites, by name.
        folder: for the authority that a roster comes with.

    Returns: the roster that all of them approved.
    """
    sites = Roster(federation=NAME, serial=0)
    for site, home in homes.items():
        sites = sites.with_site(site, membership.make_keys(home)[0])
    if not (folder / "ca.crt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pki.make_authority(folder, NAME)
    authority = (folder / "ca.crt").read_text()
    here = Address("127.0.0.1", 1)  # nothing connects there
    for home in homes.values():
        if membership.approved(home) is None:
            membership.approve(
                home, membership.ApprovedFederation(name=NAME, server=here, authority=authority, sites=sites)
            )
    return sites
