"""A site's side of one attempt: every check that it makes, and what it answers.  No disk and no network here.

Bonawitz et al. 2017, the protocol for an active adversary, with a complete graph.  The coordinator is not believed
in anything: who the others are is the roster's, what they said is signed, and what all were told is in the context.
client/masked/attempts.py keeps what must survive and adds what spans attempts: that none is used twice, and
differencing.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.errors import RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.secagg import keys, messages, shamir
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import SALT_BYTES, Advert, Attempt, Opened, Packet
from chexfound.secagg.parameters import Parameters, labelling

PART = shamir.SHARE_BYTES + SALT_BYTES  # of what is sealed: share and salt, for each of the two secrets


def point(sites: Roster, site: str) -> int:
    """Tell where a site's shares are of the polynomials: its place in the roster, from 1."""
    return sorted(sites.sites).index(site) + 1


def advertise(
    key: Ed25519PrivateKey,
    attempt: Attempt,
    site: str,
    secrets: Secrets,
    *,
    findings: Sequence[str],
    minimum: int,
    state: str,
) -> Advert:
    """Stage 1: what a site says of itself."""
    advert = Advert(
        site=site,
        cipher=keys.public(secrets.cipher),
        mask=keys.public(secrets.mask),
        commitment=messages.seed_commitment(attempt, site, secrets.seed),
        findings=sorted(findings),
        minimum=minimum,
        state=state,
    )
    return advert.signed(key, attempt)


def check_adverts(
    adverts: Sequence[Advert], own: Advert, attempt: Attempt, sites: Roster, parameters: Parameters
) -> dict[str, Advert]:
    """Stage 2: that these are of the roster's sites, each by its own word, with this site's among them.

    Returns: them by name; U1.

    Raises: RefusedError.
    """
    by_name = {advert.site: advert for advert in adverts}
    if len(by_name) < len(adverts):
        raise RefusedError("secagg.cohort", "a site stands among the adverts twice")
    if by_name.get(own.site) != own:
        raise RefusedError("secagg.cohort", "this site's own advert is not among them, or was changed")
    if len(by_name) < parameters.t:
        raise RefusedError("secagg.cohort", f"{len(by_name)} sites advertise, fewer than the threshold {parameters.t}")
    public = [key for advert in adverts for key in (advert.cipher, advert.mask)]
    if not all(map(keys.canonical, public)):
        raise RefusedError("secagg.cohort", "a key in a second encoding: it could be another's")
    if len(set(public)) < len(public):
        raise RefusedError("secagg.cohort", "two adverts have a key in common")
    for advert in adverts:
        advert.verify(attempt, sites)
    return by_name


@dataclass(frozen=True, kw_only=True)
class Side:
    """Hold what a site works with from stage 2 on.

    Args:
        adverts: U1, checked.
        context: of the attempt, as this site was told it.
    """

    key: Ed25519PrivateKey
    site: str
    attempt: Attempt
    sites: Roster
    parameters: Parameters
    secrets: Secrets
    adverts: Mapping[str, Advert]
    context: bytes

    # -- stage 2

    def deal(self) -> list[Packet]:
        """Shares of both secrets for every site of U1, itself among them."""
        names, threshold = sorted(self.adverts), self.parameters.t
        points = {name: point(self.sites, name) for name in names}
        mask = shamir.split(self.secrets.mask, list(points.values()), threshold)
        seed = shamir.split(self.secrets.seed, list(points.values()), threshold)
        return [self._packet(name, mask[points[name]], seed[points[name]]) for name in names]

    def _packet(self, holder: str, mask: bytes, seed: bytes) -> Packet:
        pair, salts = (self.site, holder), (os.urandom(SALT_BYTES), os.urandom(SALT_BYTES))
        text = mask + salts[0] + seed + salts[1]
        sealed = keys.seal(self.secrets.cipher, self.adverts[holder].cipher, self.attempt, self.context, pair, text)
        packet = Packet(
            dealer=self.site,
            holder=holder,
            sealed=sealed.hex(),
            mask_hash=messages.share_hash(self.attempt, self.context, pair, "mask", mask, salts[0]),
            seed_hash=messages.share_hash(self.attempt, self.context, pair, "seed", seed, salts[1]),
        )
        return packet.signed(self.key, self.attempt, self.context)

    # -- stage 3

    def check_sharers(self, sharers: Sequence[str], packets: Sequence[Packet]) -> dict[str, dict[str, Opened]]:
        """Check that U2 is of those that advertised, with this site, large enough, and that every share of it opens.

        Returns: by dealer, both shares.

        Raises: RefusedError; WrongShares where a dealer is to be told of.
        """
        if not set(sharers) <= set(self.adverts):
            raise RefusedError("secagg.sharers", "sites among the sharers that did not advertise")
        if self.site not in sharers:
            raise RefusedError("secagg.sharers", "this site is not among the sharers")
        if len(sharers) < self.parameters.t:
            raise RefusedError(
                "secagg.sharers", f"{len(sharers)} sharers, fewer than the threshold {self.parameters.t}"
            )
        by_dealer = {packet.dealer: packet for packet in packets}
        if len(by_dealer) < len(packets) or set(by_dealer) != set(sharers):
            raise RefusedError("secagg.sharers", "the packets are not one of each sharer")
        opened, wrong = {}, []
        for dealer, packet in sorted(by_dealer.items()):
            if packet.holder != self.site:
                raise RefusedError("secagg.sharers", f"a packet of {dealer!r} for another site")
            packet.verify(self.attempt, self.context, self.sites)  # by the dealer, or it says nothing of the dealer
            try:
                opened[dealer] = self._open(packet)
            except RefusedError:
                wrong.append(dealer)
        if wrong:
            raise WrongSharesError(wrong)
        return opened

    def _open(self, packet: Packet) -> dict[str, Opened]:
        pair = (packet.dealer, self.site)
        peer = self.adverts[packet.dealer].cipher
        text = keys.unseal(self.secrets.cipher, peer, self.attempt, self.context, pair, bytes.fromhex(packet.sealed))
        if len(text) != 2 * PART:
            raise RefusedError("secagg.shares", f"the shares of {packet.dealer!r} are not two")
        result = {}
        for kind, part, signed in (("mask", text[:PART], packet.mask_hash), ("seed", text[PART:], packet.seed_hash)):
            share, salt = part[: shamir.SHARE_BYTES], part[shamir.SHARE_BYTES :]
            hashed = messages.share_hash(self.attempt, self.context, pair, kind, share, salt)
            if not hmac.compare_digest(hashed, signed):
                raise RefusedError("secagg.shares", f"a share of {packet.dealer!r} is not the one that it signed")
            result[kind] = messages.parse(
                Opened, {"kind": kind, "share": share.hex(), "salt": salt.hex()}, "an opened share"
            )
        return result

    def masks(self, sharers: Sequence[str]) -> list[tuple[int, bytes]]:
        """Give the masks of this site's values, (sign, seed): its own, and with each other sharer one to cancel."""
        own = keys.own_seed(self.secrets.seed, self.attempt, self.context, sorted(sharers), self.site)
        return [(1, own)] + [
            pair_mask(
                self.secrets.mask, self.adverts[other].mask, self.attempt, self.context, sharers, self.site, other
            )
            for other in sorted(sharers)
            if other != self.site
        ]

    def zeroed(self, findings: Sequence[str], sharers: Sequence[str]) -> list[str]:
        """Findings that too few of the sharers label: every site leaves them out of its values and weights."""
        least = labelling(max(self.adverts[name].minimum for name in sharers), self.parameters.c)
        return too_rare(findings, [self.adverts[name] for name in sharers], least)

    def sign_masked(self, sharers: Sequence[str], payload: str) -> str:
        """The signature over the masked arrays, by their SHA-256; hex."""
        fields = messages.masked_fields(self.attempt, self.context, self.site, sharers, payload)
        return signing.sign(self.key, signing.MASKED, fields).hex()

    # -- stages 4 and 5

    def sign_survivors(self, sharers: Sequence[str], survivors: Sequence[str], summed: Sequence[str]) -> str:
        """Agree to a sum over these.

        Args:
            sharers: U2.
            survivors: U3.
            summed: the findings that this site did not zero.

        Returns: the signature, in hex.

        Raises: RefusedError.
        """
        if not set(survivors) <= set(sharers):
            raise RefusedError("secagg.survivors", "sites among the survivors that did not share")
        if self.site not in survivors:
            raise RefusedError("secagg.survivors", "this site is not among the survivors")
        if len(survivors) < self.parameters.survivors:
            raise RefusedError(
                "secagg.survivors", f"{len(survivors)} survivors, fewer than {self.parameters.survivors}"
            )
        least = labelling(max(self.adverts[name].minimum for name in sharers), self.parameters.c)
        if rare := too_rare(summed, [self.adverts[name] for name in survivors], least):
            raise RefusedError("secagg.findings", f"fewer than {least} survivors label {rare[:3]}")
        fields = messages.survivors_fields(self.attempt, self.context, sharers, survivors)
        return signing.sign(self.key, signing.SURVIVORS, fields).hex()

    def check_signers(self, sharers: Sequence[str], survivors: Sequence[str], signatures: Mapping[str, str]) -> None:
        """Check that a threshold of survivors agreed to the very same sum.

        Raises: RefusedError.
        """
        if not set(signatures) <= set(survivors):
            raise RefusedError("secagg.signers", "a signature of a site that is not among the survivors")
        if len(signatures) < self.parameters.t:
            raise RefusedError("secagg.signers", f"{len(signatures)} signatures, fewer than {self.parameters.t}")
        fields = messages.survivors_fields(self.attempt, self.context, sharers, survivors)
        for name, signature in signatures.items():
            messages.verify(self.sites, name, signature, signing.SURVIVORS, fields)

    @staticmethod
    def answer(shares: Mapping[str, Mapping[str, Opened]], survivors: Iterable[str]) -> dict[str, Opened]:
        """For every sharer one share: of its own mask's seed if it survived, of its pairwise key if it did not."""
        kept = set(survivors)
        return {dealer: both["seed" if dealer in kept else "mask"] for dealer, both in sorted(shares.items())}


class WrongSharesError(RefusedError):
    """Shares that their dealers signed, and that cannot be used.

    Args:
        dealers: whose.
    """

    def __init__(self, dealers: Sequence[str]) -> None:
        super().__init__("secagg.shares", f"the shares of {', '.join(map(repr, dealers))} are not what was signed")
        self.dealers = list(dealers)


def pair_mask(
    private: bytes, peer: str, attempt: Attempt, context: bytes, sharers: Sequence[str], site: str, other: str
) -> tuple[int, bytes]:
    """The mask that `site` adds for `other`: +1 where it comes first by name, −1 where it does not; and the seed."""
    pair = (site, other) if site < other else (other, site)
    seed = keys.pair_seed(private, peer, attempt, context, sorted(sharers), pair)
    return (1 if site < other else -1), seed


def too_rare(findings: Sequence[str], adverts: Sequence[Advert], least: int) -> list[str]:
    """Findings that fewer than `least` of these sites label."""
    return [finding for finding in findings if sum(finding in advert.findings for advert in adverts) < least]
