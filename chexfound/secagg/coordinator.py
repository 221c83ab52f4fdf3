"""The coordinator's side of one attempt: it holds what sites send against their signatures, and opens the one sum.

None of this protects a site, which makes its own checks; it finds who is at fault, so that an attempt that must fail
fails early and the next one goes on without that site.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chexfound.errors import ProtocolError
from chexfound.identity.roster import Roster
from chexfound.secagg import keys, messages, shamir
from chexfound.secagg.messages import Advert, Attempt, Opened, Packet
from chexfound.secagg.parameters import Parameters
from chexfound.secagg.site import pair_mask, point


class BlameError(ProtocolError):
    """A site that dealt or opened a wrong share.

    Args:
        site: which.
        did: what.
    """

    def __init__(self, site: str, did: str) -> None:
        super().__init__(f"site {site!r} {did}")
        self.site = site


@dataclass(kw_only=True)
class Opening:
    """Collects opened shares, and from them the masks that lie on the survivors' sum.

    Args:
        packets: by dealer and holder, verified.
        sharers: U2.
        survivors: U3.
    """

    attempt: Attempt
    sites: Roster
    parameters: Parameters
    context: bytes
    adverts: Mapping[str, Advert]
    packets: Mapping[tuple[str, str], Packet]
    sharers: Sequence[str]
    survivors: Sequence[str]
    _shares: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by holder: dealer -> share

    def add(self, holder: str, opened: Mapping[str, Opened]) -> None:
        """Take in what one survivor opened.

        Raises: BlameError if it is not, share by share, what the dealers signed.
        """
        if set(opened) != set(self.sharers):
            raise BlameError(holder, "did not open one share of each sharer")
        shares = {}
        for dealer, one in opened.items():
            kind = "seed" if dealer in self.survivors else "mask"
            packet = self.packets[dealer, holder]
            share, salt = bytes.fromhex(one.share), bytes.fromhex(one.salt)
            hashed = messages.share_hash(self.attempt, self.context, (dealer, holder), kind, share, salt)
            signed = packet.seed_hash if kind == "seed" else packet.mask_hash
            if one.kind != kind or not hmac.compare_digest(hashed, signed):
                raise BlameError(holder, f"opened a share of {dealer!r} that is not the one it was dealt")
            shares[dealer] = share
        self._shares[holder] = shares

    @property
    def enough(self) -> bool:
        """Whether a threshold of holders has opened."""
        return len(self._shares) >= self.parameters.t

    def masks(self) -> list[tuple[int, bytes]]:
        """Give what lies on the sum of the survivors' masked arrays: (sign, seed), to be taken off.

        Raises: ProtocolError if too few have opened; BlameError for a dealer whose shares, all as it signed them, give
            no secret of its own.
        """
        if not self.enough:  # or an honest dealer would be blamed for it
            raise ProtocolError(f"{len(self._shares)} sites opened their shares; it takes {self.parameters.t}")
        holders = sorted(self._shares)[: self.parameters.t]
        points = {holder: point(self.sites, holder) for holder in holders}
        lying = []
        for dealer in sorted(self.sharers):
            secret = self._secret(dealer, {points[holder]: self._shares[holder][dealer] for holder in holders})
            if dealer in self.survivors:
                own = keys.own_seed(secret, self.attempt, self.context, sorted(self.sharers), dealer)
                lying.append((1, own))
                continue
            for other in sorted(self.survivors):  # what `other` added for the one that was lost
                sign, seed = pair_mask(
                    secret, self.adverts[other].mask, self.attempt, self.context, self.sharers, dealer, other
                )
                lying.append((-sign, seed))
        return lying

    def _secret(self, dealer: str, shares: Mapping[int, bytes]) -> bytes:
        advert = self.adverts[dealer]
        try:
            secret = shamir.join(shares, self.parameters.t)
        except ProtocolError as error:
            raise BlameError(dealer, "dealt shares of no secret") from error
        if dealer in self.survivors:
            told, is_ = advert.commitment, messages.seed_commitment(self.attempt, dealer, secret)
        else:
            told, is_ = advert.mask, keys.public(secret)
        if not hmac.compare_digest(told, is_):
            raise BlameError(dealer, "dealt shares of another secret than it advertised")
        return secret


def accused(complaints: Mapping[str, Sequence[str]], colluders: int) -> tuple[list[str], list[str]]:
    """Name the sites to leave out after complaints that shares do not open.

    A dealer that more than c sites accuse has dealt wrongly, since at most c lie; a site that accuses more than c
    dealers lies.  Of any other pair one does, and nobody can tell which: both are left out.  With no colluders one
    site may still be broken, and is told apart from the others as if c were 1.

    Args:
        complaints: by the site that complains: dealers.
        colluders: c.

    Returns: those that are at fault, and those of pairs of which one is.
    """
    liars = max(colluders, 1)
    accusers: dict[str, set[str]] = {}
    for site, dealers in complaints.items():
        for dealer in dealers:
            accusers.setdefault(dealer, set()).add(site)
    at_fault = {dealer for dealer, sites in accusers.items() if len(sites) > liars}
    at_fault |= {site for site, dealers in complaints.items() if len(set(dealers)) > liars}
    doubtful = {
        name
        for dealer, sites in accusers.items()
        for site in sites
        if dealer not in at_fault and site not in at_fault
        for name in (dealer, site)
    }
    return sorted(at_fault), sorted(doubtful)
