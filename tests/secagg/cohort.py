"""A cohort of sites with real keys and signatures, and no wire between them: what the tests of one attempt share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.identity import signing
from chexfound.identity.roster import Keys, Roster
from chexfound.secagg import messages
from chexfound.secagg.coordinator import Opening
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Attempt, Opened, Packet
from chexfound.secagg.parameters import MINIMUM, Parameters
from chexfound.secagg.site import Side, advertise

ATTEMPT = Attempt(run=7, phase="adapt", round=2, attempt=1)
Packets = dict[tuple[str, str], Packet]  # by dealer and holder


@functools.cache
def identity(name: str) -> Ed25519PrivateKey:
    """A site's identity key, always the same."""
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"\0"))


def roster(names: Iterable[str], federation: str = "thorax") -> Roster:
    """Of sites of these names."""
    sites = {name: Keys(f"node {name}", signing.public_line(identity(name).public_key())) for name in names}
    return Roster(federation=federation, serial=1, sites=sites)


@dataclass(kw_only=True)
class Cohort:
    """An attempt of n sites, all of which advertise; the secrets of each are to be had, as no coordinator has them.

    Args:
        findings: by site, that it labels.
        minimums: by site, where another than the least.
    """

    n: int
    colluders: int | None = None
    attempt: Attempt = ATTEMPT
    findings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    minimums: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [f"S{number:02d}" for number in range(self.n)]
        self.sites = roster(self.names)
        self.parameters = Parameters.of(self.n, self.colluders)
        self.secrets = {name: Secrets.fresh() for name in self.names}
        self.adverts = {name: self.advert(name) for name in self.names}

    def advert(self, name: str) -> Advert:
        """What a site says of itself."""
        return advertise(
            identity(name),
            self.attempt,
            name,
            self.secrets[name],
            findings=self.findings.get(name, []),
            minimum=self.minimums.get(name, MINIMUM),
            state="",
        )

    def context(self, advertised: Sequence[str] | None = None, weights: str = "0" * 64) -> bytes:
        """What these sites were told, U1 among it."""
        return messages.context_of(
            self.attempt,
            self.sites,
            self.parameters,
            {name: self.adverts[name] for name in advertised or self.names},
            request={"phase": self.attempt.phase},
            weights=weights,
            recipe="{}",
            layout=[],
        )

    def side(self, name: str, advertised: Sequence[str] | None = None, context: bytes | None = None) -> Side:
        """One site from stage 2 on."""
        return Side(
            key=identity(name),
            site=name,
            attempt=self.attempt,
            sites=self.sites,
            parameters=replace(self.parameters, minimum=self.minimums.get(name, MINIMUM)),
            secrets=self.secrets[name],
            adverts={other: self.adverts[other] for other in advertised or self.names},
            context=context or self.context(advertised),
        )

    def sides(self, advertised: Sequence[str] | None = None) -> dict[str, Side]:
        """All sites of U1."""
        context = self.context(advertised)
        return {name: self.side(name, advertised, context) for name in advertised or self.names}

    def opening(
        self,
        packets: Packets,
        sharers: Sequence[str],
        survivors: Sequence[str],
        advertised: Sequence[str] | None = None,
    ) -> Opening:
        """The coordinator's last stage."""
        return Opening(
            attempt=self.attempt,
            sites=self.sites,
            parameters=self.parameters,
            context=self.context(advertised),
            adverts={name: self.adverts[name] for name in advertised or self.names},
            packets=packets,
            sharers=sharers,
            survivors=survivors,
        )


def deal(sides: Mapping[str, Side]) -> Packets:
    """What all of them deal."""
    return {(packet.dealer, packet.holder): packet for side in sides.values() for packet in side.deal()}


def packets_to(packets: Packets, holder: str, sharers: Sequence[str]) -> list[Packet]:
    """What the coordinator hands on to one site."""
    return [packets[dealer, holder] for dealer in sharers]


def answers(
    sides: Mapping[str, Side], packets: Packets, sharers: Sequence[str], survivors: Sequence[str]
) -> dict[str, dict[str, Opened]]:
    """What each survivor opens."""
    return {
        name: Side.answer(sides[name].check_sharers(sharers, packets_to(packets, name, sharers)), survivors)
        for name in survivors
    }
