"""Messages of sites to each other through the coordinator: checked values, signatures over them, and the context.

Everything here comes from outside; `parse` makes it into values of known length, and each `verify` holds the
signature against the identity key of the roster that the site's own operator approved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from chexfound.contract.fields import parse as parse
from chexfound.durable.files import canonical
from chexfound.errors import ProtocolError, RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.secagg.parameters import SITES_MAX, Parameters
from chexfound.secagg.shamir import SHARE_BYTES

STRICT = ConfigDict(extra="forbid", strict=True)
Number = Annotated[int, Field(ge=0, lt=2**64)]
Word = Annotated[str, Field(min_length=1, max_length=64)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # 32 bytes
Share = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * SHARE_BYTES}}}$")]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
Sealed = Annotated[str, Field(pattern="^([0-9a-f]{2}){1,512}$")]
SALT_BYTES = 32
STAGES = ("advertise", "share", "masked", "consistency", "unmask")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Attempt:
    """Name a sum under masks: run, phase, round and try; every try has fresh keys."""

    run: Number
    phase: Word
    round: Number
    attempt: Number

    def fields(self) -> list[bytes]:
        """Give the attempt's values as bytes, as they are signed."""
        return [str(self.run).encode(), self.phase.encode(), str(self.round).encode(), str(self.attempt).encode()]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Advert:
    """Stage 1, of a site: X25519 keys, and what the others must know of it.

    Args:
        cipher: with which the shares to it are sealed.
        mask: from which its pairwise masks come.
        commitment: to the seed of its own mask.
        findings: that its images label, in this phase.
        minimum: sites that a sum must be over, by its own wish.
        state: digest of the rounds that its carried state includes; empty if it has none.
    """

    site: Word
    cipher: Digest
    mask: Digest
    commitment: Digest
    findings: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=4096)]
    minimum: Annotated[int, Field(ge=0, le=SITES_MAX)]
    state: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")] = ""

    def signed(self, key: Ed25519PrivateKey, attempt: Attempt) -> Advert:
        """With its site's signature."""
        return replace(self, signature=signing.sign(key, signing.ADVERT, self._fields(attempt)).hex())

    def verify(self, attempt: Attempt, sites: Roster) -> None:
        """Check that the site of that name said so in this attempt.

        Raises: RefusedError.
        """
        verify(sites, self.site, self.signature, signing.ADVERT, self._fields(attempt))

    def _fields(self, attempt: Attempt) -> list[bytes]:
        return [*attempt.fields(), canonical(asdict(self) | {"signature": ""})]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Packet:
    """Stage 2, from a dealer to a holder: one share of each of its secrets, sealed, and hashes of both.

    The holder opens a share to the coordinator with its salt; the dealer's hash tells a wrong share from the one that
    was dealt.
    """

    dealer: Word
    holder: Word
    sealed: Sealed
    mask_hash: Digest
    seed_hash: Digest
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")] = ""

    def signed(self, key: Ed25519PrivateKey, attempt: Attempt, context: bytes) -> Packet:
        """With its dealer's signature."""
        return replace(self, signature=signing.sign(key, signing.PACKET, self._fields(attempt, context)).hex())

    def verify(self, attempt: Attempt, context: bytes, sites: Roster) -> None:
        """Check that the dealer made it, for this holder in this context.

        Raises: RefusedError.
        """
        verify(sites, self.dealer, self.signature, signing.PACKET, self._fields(attempt, context))

    def _fields(self, attempt: Attempt, context: bytes) -> list[bytes]:
        return [*attempt.fields(), context, canonical(asdict(self) | {"signature": ""})]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Opened:
    """Stage 5, of a holder: one share of one of a dealer's two secrets, with the salt of its hash."""

    kind: Literal["mask", "seed"]
    share: Share
    salt: Digest


def share_hash(attempt: Attempt, context: bytes, packet: tuple[str, str], kind: str, share: bytes, salt: bytes) -> str:
    """Hash a share with its salt, dealer and holder: SHA-256, hexadecimal."""
    dealer, holder = packet
    fields = [*attempt.fields(), context, dealer.encode(), holder.encode(), kind.encode(), share, salt]
    return hashlib.sha256(signing.statement("chexfound secagg share v1", fields)).hexdigest()


def seed_commitment(attempt: Attempt, site: str, seed: bytes) -> str:
    """To the seed of a site's own mask, which has 256 bits and needs no salt; hex."""
    fields = [*attempt.fields(), site.encode(), seed]
    return hashlib.sha256(signing.statement("chexfound secagg seed v1", fields)).hexdigest()


def names_digest(names: Sequence[str]) -> bytes:
    """Hash a set of sites: SHA-256 of their sorted names, 32 bytes."""
    return hashlib.sha256(canonical(sorted(names))).digest()


def masked_fields(attempt: Attempt, context: bytes, site: str, sharers: Sequence[str], payload: str) -> list[bytes]:
    """Give what a site signs of its masked arrays (`payload`: their SHA-256 in hex)."""
    return [*attempt.fields(), context, site.encode(), names_digest(sharers), payload.encode()]


def survivors_fields(attempt: Attempt, context: bytes, sharers: Sequence[str], survivors: Sequence[str]) -> list[bytes]:
    """Give what a survivor signs before it opens anything."""
    return [*attempt.fields(), context, names_digest(sharers), names_digest(survivors)]


def verify(sites: Roster, site: str, signature: str, purpose: str, fields: Sequence[bytes]) -> None:
    """Check a site's word by the key that the roster has of it.

    Raises: RefusedError.
    """
    if site not in sites.sites:
        raise RefusedError("secagg.cohort", f"{site!r} is not in the roster")
    key = signing.read_public_line(sites.sites[site].identity)
    try:
        signing.verify(key, bytes.fromhex(signature), purpose, fields)
    except ProtocolError as error:
        raise RefusedError("secagg.signature", f"{site!r}: {error}") from error


def context_of(
    attempt: Attempt,
    sites: Roster,
    parameters: Parameters,
    adverts: Mapping[str, Advert],
    *,
    request: Mapping[str, Any],
    weights: str,
    recipe: str,
    layout: Sequence[Any],
) -> bytes:
    """The context that all seeds, seals and signatures of an attempt bind: all that a site was told; 32 bytes.

    A coordinator that tells one site something else gets an input whose masks cancel with no other's (the model
    inconsistency of Pasquini et al. 2022).

    Args:
        attempt: run, phase, round and try.
        sites: the roster, all of it.
        parameters: n, c and t.
        adverts: U1, with keys and commitments.
        request: its fields, but for the site's own number.
        weights: digest of the tensors that the sites start from, and of what they have from earlier phases.
        recipe: its JSON.
        layout: of the masked arrays, with ranges and rings.
    """
    parts = [
        *attempt.fields(),
        canonical({"federation": sites.federation, "sites": sites.as_dict()["sites"]}),
        canonical(parameters.shared()),
        canonical([asdict(adverts[name]) for name in sorted(adverts)]),
        canonical(request),
        weights.encode(),
        recipe.encode(),
        canonical(layout),
    ]
    return hashlib.sha256(signing.statement("chexfound secagg context v1", parts)).digest()


def weights_of(sent: str, backbone: str) -> str:
    """Digest of all that a phase after `features` starts from, of the digests of both; hex."""
    return hashlib.sha256(canonical([sent, backbone])).hexdigest()


_T = TypeVar("_T")


def parse_all(kind: type[_T], values: Any, what: str, most: int = SITES_MAX) -> list[_T]:
    """Read a list of values of a kind from outside.

    Raises: ProtocolError.
    """
    if not isinstance(values, list) or len(values) > most:
        raise ProtocolError(f"{what}: not a list of {most} or fewer")
    return [parse(kind, value, what) for value in values]


def parse_names(values: Any, what: str) -> list[str]:
    """A set of sites: names in order, each once.

    Raises: ProtocolError.
    """
    names = parse_all(str, values, what)
    if names != sorted(set(names)):
        raise ProtocolError(f"{what}: not names in order, each once")
    return names
