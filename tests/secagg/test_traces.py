"""Random strategies of a coordinator, by the model and by the code: each verdict, share and mask of both is the same.

Site 0 of the model colludes and is S00 of the cohort.  What a site is told it is told by the same draw on both sides;
where it refuses it is silent from then on, in the model as in the code.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pytest

from chexfound.errors import ProtocolError, RefusedError
from chexfound.identity import signing
from chexfound.secagg import messages, shamir
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Opened, Packet
from chexfound.secagg.parameters import MINIMUM
from chexfound.secagg.site import Side, advertise, check_adverts, point
from tests.secagg import model
from tests.secagg.cohort import ATTEMPT, Cohort, identity
from tests.secagg.model import Told

FINDING = "Nodule"
LABELLING = [0, 1, 2]
COLLUDER = "S00"
Shares = dict[str, dict[int, bytes]]  # by dealer: point -> share


def names(sites: int) -> list[str]:
    """The sites of a set."""
    return [f"S{site:02d}" for site in range(sites.bit_length()) if sites >> site & 1]


def code_of(act: Callable[[], Any]) -> str | None:
    """The word of a refusal; None if it is none."""
    try:
        act()
    except RefusedError as error:
        return error.code
    return None


@dataclass(frozen=True, eq=False)
class Play:
    """A roster of real sites, and the model of it."""

    n: int
    colluders: int = 1

    @cached_property
    def cohort(self) -> Cohort:
        return Cohort(n=self.n, colluders=self.colluders, findings={f"S{site:02d}": [FINDING] for site in LABELLING})

    @cached_property
    def model(self) -> model.Cohort:
        declared = sum(1 << site for site in LABELLING)
        t = self.cohort.parameters.t
        return model.Cohort(n=self.n, c=self.colluders, t=t, minimum=MINIMUM, declared=declared, colluders_leave=True)

    @cached_property
    def honest(self) -> list[str]:
        return [f"S{site:02d}" for site in self.model.honest]

    def anything(self, draw: random.Random) -> int:
        """A set of names, those of no roster among them now and then."""
        found = draw.choice([(1 << self.n) - 1, draw.getrandbits(self.n), draw.getrandbits(self.n)])
        return found | (draw.choice([0, 0, 0, draw.getrandbits(self.model.t)]) << self.n)

    def either(self, options: Sequence[Sequence[Any]], draw: random.Random) -> list[int]:
        """For each site something that it accepts, or anything."""
        good = model.alike_mostly(options, draw)
        return [one if one is not None and draw.random() < 0.8 else self.anything(draw) for one in good]


PLAYS = [Play(4), Play(5)]
DRAWS = 60


def advert(play: Play, site: int, forged: int) -> Advert:
    """As a site made it; or by the coordinator, for a name that it invented or with keys that are not the site's."""
    name = f"S{site:02d}"
    if site < play.n and not forged >> site & 1:
        return play.cohort.adverts[name]
    key = identity(name if site >= play.n else "coordinator")
    return advertise(key, ATTEMPT, name, Secrets.fresh(), findings=[], minimum=MINIMUM, state="")


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: f"{play.n}-sites")
def test_a_site_judges_any_adverts_as_the_model_does(play: Play) -> None:
    draw, seen = random.Random(play.n), Counter[bool]()
    for _ in range(4 * DRAWS):
        site = draw.choice(play.model.honest)
        u1 = play.anything(draw)
        forged = u1 & draw.choice([0, 0, 1 << draw.choice(play.model.honest)])
        adverts = [advert(play, one, forged) for one in range(u1.bit_length()) if u1 >> one & 1]
        own = play.cohort.adverts[f"S{site:02d}"]
        judged = code_of(lambda: check_adverts(adverts, own, ATTEMPT, play.cohort.sites, play.cohort.parameters))  # noqa: B023
        accepted = (u1, forged) in {option[:2] for option in model.told_options(play.model, site)}
        assert (judged is None) == accepted, (site, names(u1), names(forged), judged)
        seen[accepted] += 1
    assert min(seen[True], seen[False]) > DRAWS / 4


@dataclass(eq=False)
class Real:
    """What the code's sites do when they are told what the model's are."""

    play: Play
    told: Sequence[Told]
    opened: dict[int, dict[str, dict[str, Opened]]] = field(default_factory=dict)
    signed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def sides(self) -> list[Side]:
        """The honest sites, each as it was told."""
        cohort = self.play.cohort
        contexts = [cohort.context(names(one.u1), weights=f"{one.request}" * 64) for one in self.told]
        return [
            cohort.side(name, names(one.u1), context)
            for name, one, context in zip(self.play.honest, self.told, contexts, strict=True)
        ]

    @cached_property
    def colluder(self) -> list[Side]:
        """The colluder, as each of the honest sites was told: it goes along with all of them."""
        secrets = self.play.cohort.secrets[COLLUDER]
        return [replace(side, site=COLLUDER, key=identity(COLLUDER), secrets=secrets) for side in self.sides]

    @cached_property
    def packets(self) -> dict[tuple[str, str], Packet]:
        """What the sites dealt, and what the colluder seals for each."""
        dealt = {(packet.dealer, packet.holder): packet for side in self.sides for packet in side.deal()}
        for theirs, side in zip(self.colluder, self.sides, strict=True):
            if COLLUDER in side.adverts:
                dealt |= {(COLLUDER, one.holder): one for one in theirs.deal() if one.holder == side.site}
        return dealt

    def masked(self, k: int, u2: int) -> str | None:
        """How a site judges a U2; where there is no packet, one is made up."""
        side = self.sides[k]
        own = self.packets[side.site, side.site]
        given = [self.packets.get((name, side.site)) or replace(own, dealer=name) for name in names(u2)]

        def check() -> None:
            self.opened[k] = side.check_sharers(names(u2), given)

        return code_of(check)

    def consistency(self, k: int, u2: int, u3: int) -> str | None:
        """How a site judges a U3."""
        side = self.sides[k]
        zeroed = side.zeroed([FINDING], names(u2))

        def sign() -> None:
            summed = [] if zeroed else [FINDING]
            self.signed[side.site] = side.sign_survivors(names(u2), names(u3), summed)

        return code_of(sign)

    def unmasked(self, k: int, u2: int, u3: int) -> bool:
        """Whether a site opens its shares for any signatures that can be had."""
        side = self.sides[k]
        fields = messages.survivors_fields(ATTEMPT, side.context, names(u2), names(u3))
        there = self.signed | {COLLUDER: signing.sign(identity(COLLUDER), signing.SURVIVORS, fields).hex()}
        sites = self.play.cohort.sites
        fit = {
            name: signature
            for name, signature in there.items()
            if code_of(lambda: messages.verify(sites, name, signature, signing.SURVIVORS, fields)) is None  # noqa: B023
        }
        given = [there, fit, {name: signature for name, signature in fit.items() if name in names(u3)}]
        return any(code_of(lambda: side.check_signers(names(u2), names(u3), one)) is None for one in given)  # noqa: B023

    def secrets(self, answered: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """The honest sites whose seed the coordinator can join from what it holds, and those whose mask key."""
        shares: dict[str, Shares] = {kind: {name: {} for name in self.play.honest} for kind in ("seed", "mask")}

        def take(holder: str, opened: dict[str, Opened]) -> None:
            for dealer in opened.keys() & shares["seed"].keys():
                one = opened[dealer]
                shares[one.kind][dealer][point(self.play.cohort.sites, holder)] = bytes.fromhex(one.share)

        for theirs, side in zip(self.colluder, self.sides, strict=True):
            if (packet := self.packets.get((side.site, COLLUDER))) is not None:
                both = theirs._open(packet)
                take(COLLUDER, {side.site: both["seed"]})
                take(COLLUDER, {side.site: both["mask"]})
        for k, u3 in answered:
            take(self.sides[k].site, Side.answer(self.opened[k], names(u3)))
        return self.joined(shares["seed"], "seed"), self.joined(shares["mask"], "mask")

    def joined(self, shares: Shares, kind: str) -> int:
        """The sites whose secret these shares give."""
        found = 0
        for site, name in zip(self.play.model.honest, self.play.honest, strict=True):
            try:
                secret = shamir.join(shares[name], self.play.cohort.parameters.t)
            except ProtocolError:
                continue
            assert secret == getattr(self.play.cohort.secrets[name], kind)
            found |= 1 << site
        return found

    def masks(self, u2: Sequence[int | None]) -> list[tuple[int, tuple[int, ...]]]:
        """Each seed of a pair of honest sites: of which pair, and how it stands in the inputs."""
        sent = [(k, one) for k, one in enumerate(u2) if one is not None]
        found: dict[tuple[int, bytes], list[int]] = {}
        for column, (k, sharers) in enumerate(sent):
            own = self.sides[k].site
            others = [name for name in names(sharers) if name != own]
            for other, (sign, seed) in zip(others, self.sides[k].masks(names(sharers))[1:], strict=True):
                if other in self.play.honest:
                    pair = sum(1 << int(name[1:]) for name in (own, other))
                    found.setdefault((pair, seed), [0] * len(sent))[column] += sign
        return sorted((pair, tuple(column)) for (pair, _), column in found.items())


def drawn(play: Play, draw: random.Random) -> list[Told]:
    """What each site is told up to U1, all of which it accepts."""
    options = [[one for one in model.told_options(play.model, site) if one[2] == (0,)] for site in play.model.honest]
    requests = draw.choice([[1], [1], [1, 2]])
    return [Told(*one, draw.choice(requests)) for one in model.alike_mostly(options, draw)]


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: f"{play.n}-sites")
def test_a_random_strategy_opens_by_the_code_what_it_opens_by_the_model(play: Play) -> None:
    draw, seen = random.Random(play.n), Counter[tuple[str, bool]]()
    for _ in range(DRAWS):
        told = drawn(play, draw)
        attempt, real = model.Attempt(play.model, told), Real(play, told)
        u2: list[int | None] = list(play.either(attempt.u2_options, draw))
        for k, one in enumerate(u2):
            accepted = one in attempt.u2_options[k]
            assert (real.masked(k, one or 0) is None) == accepted, (told, k, one)
            u2[k] = one if accepted else None
            seen["U2", accepted] += 1
        options = [attempt.u3_options(k, one) for k, one in enumerate(u2)]
        u3: list[int | None] = list(play.either(options, draw))
        for k, one in enumerate(u3):
            accepted, sharers = one in options[k], u2[k]
            if sharers is not None:
                assert (real.consistency(k, sharers, one or 0) is None) == accepted, (told, u2, k, one)
            u3[k] = one if accepted and sharers is not None else None
            seen["U3", accepted] += 1
        answered = attempt.answers(u2, u3)
        asked = [(k, u2[k] or 0, one) for k, one in enumerate(u3) if one is not None]
        for k, before, survivors in asked:
            assert real.unmasked(k, before, survivors) == bool(answered[k]), (told, u2, u3, k)
            seen["shares", bool(answered[k])] += 1
        opened = real.secrets((k, survivors) for k, _, survivors in asked if answered[k])
        assert opened == attempt.secrets(u2, answered), (told, u2, u3)
        assert real.masks(u2) == sorted(attempt.inputs(tuple(u2))[1]), (told, u2)
        seen["sum", bool(attempt.sums(tuple(u2), *opened))] += 1
    assert min(seen[what, verdict] for what in ("U2", "U3", "shares", "sum") for verdict in (True, False)) >= 5, seen
