"""The symbolic model of model.py is the code's: on the same traces both accept and both refuse, check by check.

Site 0 of the model colludes and is S00 of the cohort; names that it invents are strangers, each with keys of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from chexfound.errors import REFUSALS, RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Keys
from chexfound.secagg import keys, messages, site
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Packet
from chexfound.secagg.parameters import MINIMUM, Parameters
from chexfound.secagg.site import Side, advertise, check_adverts, pair_mask
from tests.secagg import model
from tests.secagg.cohort import ATTEMPT, Cohort, deal, identity
from tests.secagg.model import Check

K = Check
N, C, T = 5, 1, 4
ME = 2
LABELLING = [0, 1, 3]  # the sites that declare the finding
COHORT = Cohort(n=N, colluders=C, findings={f"S{site:02d}": ["Nodule"] for site in LABELLING})
SIDES = COHORT.sides()
PACKETS = deal(SIDES)
ALL = (1 << N) - 1
STRANGERS = range(N, N + T)

# Each check of the model, and the word by which a site refuses what it forbids; None: nothing is refused, since what
# two sites make no longer fits (each has a test below, or in the file that is named).
REFUSED: dict[Check, str | None] = {
    K.ROSTER_N: "secagg.parameters",  # tests/client/test_hostile_coordinator.py: other-threshold, fewer-sites
    K.U1_ROSTER: "secagg.cohort",
    K.U1_SIGNED: "secagg.signature",
    K.U1_OWN: "secagg.cohort",
    K.U1_SIZE: "secagg.cohort",
    K.U1_KEYS: "secagg.cohort",
    K.CONTEXT_U1: None,
    K.CONTEXT_REQUEST: None,
    K.SEALS_CONTEXT: "secagg.shares",
    K.SEALS_OPEN: "secagg.shares",
    K.U2_IN_U1: "secagg.sharers",
    K.U2_OWN: "secagg.sharers",
    K.U2_SIZE: "secagg.sharers",
    K.ONE_U2: "secagg.repeat",  # tests/client/test_hostile_coordinator.py: what is asked twice
    K.SEEDS_CONTEXT: None,
    K.SEEDS_U2: None,
    K.SEEDS_NAMES: None,
    K.FINDING_U2: None,
    K.FINDING_U3: "secagg.findings",
    K.U3_IN_U2: "secagg.survivors",
    K.U3_OWN: "secagg.survivors",
    K.U3_SIZE: "secagg.survivors",
    K.ONE_U3: "secagg.survivors-twice",  # likewise
    K.SIGNERS: "secagg.signers",
    K.SIGNERS_DISTINCT: "secagg.signers",
    K.SIGNERS_IN_U3: "secagg.signers",
    K.SIGNED_CONTEXT: "secagg.signature",
    K.SIGNED_U2: "secagg.signature",
    K.SIGNED_U3: "secagg.signature",
    K.ONE_ANSWER: "secagg.repeat",  # likewise
    K.JOURNAL: "secagg.differencing",  # tests/client/test_differencing.py
    K.FRESH_KEYS: None,
}


def names(sites: int | Iterable[int]) -> list[str]:
    """The sites of a set, by name."""
    found = [site for site in range(N + T) if sites >> site & 1] if isinstance(sites, int) else sites
    return [f"S{site:02d}" for site in found]


def cohort(*off: Check, **more: Any) -> model.Cohort:
    return model.Cohort(n=N, c=C, t=T, minimum=MINIMUM, off=frozenset(off), colluders_leave=True, **more)


def code_of(act: Callable[[], Any]) -> str | None:
    """The word of a refusal; None if it is none."""
    try:
        act()
    except RefusedError as error:
        return error.code
    return None


def test_every_check_is_mapped_and_every_word_is_some_checks() -> None:
    assert set(REFUSED) == set(Check)
    assert set(filter(None, REFUSED.values())) <= set(REFUSALS)
    said = set(re.findall(r'"(secagg\.[a-z-]+)"', inspect.getsource(site)))
    assert len(said) > 5
    assert said <= set(REFUSED.values())


# -- U1


def stranger(site: int) -> Advert:
    """An advert of a name that the coordinator invented, signed by a key that it has."""
    (name,) = names([site])
    return advertise(identity(name), ATTEMPT, name, Secrets.fresh(), findings=[], minimum=MINIMUM, state="")


def forged(site: int) -> Advert:
    """An honest site's advert with keys of the coordinator, who cannot sign it."""
    (name,) = names([site])
    theirs = identity("coordinator")
    return advertise(theirs, ATTEMPT, name, Secrets.fresh(), findings=[], minimum=MINIMUM, state="")


Told = tuple[int, int]  # U1, and which of its honest sites are forged


def share(told: Told) -> str | None:
    """How the site judges a U1."""
    u1, false = told
    adverts = [
        forged(site) if false >> site & 1 else stranger(site) if site >= N else COHORT.adverts[names([site])[0]]
        for site in range(N + T)
        if u1 >> site & 1
    ]
    own = COHORT.adverts[names([ME])[0]]
    return code_of(lambda: check_adverts(adverts, own, ATTEMPT, COHORT.sites, COHORT.parameters))


def u1s(*off: Check) -> set[Told]:
    return {(u1, false) for u1, false, _ in model.told_options(cohort(*off), ME)}


# -- U2


def masked(u2: int, packets: dict[tuple[str, str], Packet] | None = None) -> str | None:
    """How the site judges a U2 after a U1 of all, with a packet of each."""
    me, sharers = names([ME])[0], names(u2)
    there = {**PACKETS, **(packets or {})}
    given = [there.get((dealer, me)) or replace(PACKETS[me, me], dealer=dealer) for dealer in sharers]
    return code_of(lambda: SIDES[me].check_sharers(sharers, given))


def attempt(*off: Check, request: Sequence[int] = (1,) * (N - C)) -> model.Attempt:
    return model.Attempt(cohort(*off), [model.Told(ALL, 0, (0,), one) for one in request])


def u2s(*off: Check, request: Sequence[int] = (1,) * (N - C)) -> set[int]:
    return {u2 for u2 in attempt(*off, request=request).u2_options[ME - C] if u2 is not None}


# -- U3


def consistency(trace: tuple[int, int]) -> str | None:
    """How the site judges a U3 after a U2."""
    u2, u3 = trace
    side = SIDES[names([ME])[0]]
    summed = [finding for finding in ["Nodule"] if finding not in side.zeroed(["Nodule"], names(u2))]
    return code_of(lambda: side.sign_survivors(names(u2), names(u3), summed))


def u3s(*off: Check) -> set[tuple[int, int]]:
    declared = sum(1 << site for site in LABELLING)
    one = cohort(*off, declared=declared)
    found = [(u2, u3) for u2 in u2s() for u3 in model.u3_options(one, ME, u2, ALL, T)]
    return {(u2, u3) for u2, u3 in found if u3 is not None}


STAGES: dict[str, tuple[Callable[..., set[Any]], Callable[[Any], str | None], list[Check]]] = {
    "U1": (u1s, share, [K.U1_ROSTER, K.U1_SIGNED, K.U1_OWN, K.U1_SIZE]),
    "U2": (u2s, masked, [K.U2_IN_U1, K.U2_OWN, K.U2_SIZE]),
    "U3": (u3s, consistency, [K.U3_IN_U2, K.U3_OWN, K.U3_SIZE, K.FINDING_U3]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_site_accepts_every_set_that_the_model_accepts(stage: str) -> None:
    accepted, judge, _ = STAGES[stage]
    traces = accepted()
    assert len(traces) > 1
    assert {trace: judge(trace) for trace in traces} == dict.fromkeys(traces)


@pytest.mark.parametrize("check", [check for _, _, checks in STAGES.values() for check in checks], ids=lambda k: k.name)
def test_what_only_one_check_refuses_the_site_refuses_by_its_word(check: Check) -> None:
    accepted, judge, _ = next(stage for stage in STAGES.values() if check in stage[2])
    traces = accepted(check) - accepted()
    assert traces
    # A name of no roster has no key to be signed by, and two of an own advert are looked at before signatures.
    words = {REFUSED[check]} | ({"secagg.signature"} if check is K.U1_ROSTER else set())
    assert {judge(trace) for trace in traces} <= words


def test_keys_that_two_adverts_share_are_refused() -> None:
    """The model's `keys`: the colluder shows an honest site's mask key as its own."""
    own = COHORT.adverts["S02"]
    copied = replace(COHORT.adverts["S00"], mask=COHORT.adverts["S03"].mask).signed(identity("S00"), ATTEMPT)
    told = cohort(copies=True, twin_keys=False)
    assert all(shown == (0,) for u1, _, shown in model.told_options(told, ME) if u1 == ALL)
    off = replace(told, off=frozenset({K.U1_KEYS}))
    assert any(shown == (3,) for u1, _, shown in model.told_options(off, ME) if u1 == ALL)
    adverts = [copied if advert.site == "S00" else advert for advert in COHORT.adverts.values()]
    assert code_of(lambda: check_adverts(adverts, own, ATTEMPT, COHORT.sites, COHORT.parameters)) == "secagg.cohort"


# -- what one site was told, and another was not


def other_context(kind: Check) -> bytes:
    """The context of a site that was told another U1, or another request."""
    if kind is K.CONTEXT_U1:
        return COHORT.context(names(ALL & ~1))
    return COHORT.context(weights="1" * 64)


@pytest.mark.parametrize("kind", [K.CONTEXT_U1, K.CONTEXT_REQUEST], ids=lambda k: k.name)
def test_contexts_cover_what_the_model_says(kind: Check) -> None:
    assert other_context(kind) != COHORT.context()
    first, second = (one.context for one in (attempt(), attempt(kind)))
    told = [model.Told(ALL, 0, (0,), 1 + (site == 3)) for site in range(C, N)]
    apart = model.Attempt(cohort(), told).context
    assert len(set(apart)) == 2
    assert len(set(first)) == len(set(second)) == 1


def elsewhere(context: bytes) -> dict[tuple[str, str], Packet]:
    """What S03 deals, signed as for this site's context, and sealed under another."""
    dealt = deal({"S03": replace(SIDES["S03"], context=context)})
    there = deal({"S03": SIDES["S03"]})
    both = {
        pair: replace(packet, sealed=dealt[pair].sealed).signed(identity("S03"), ATTEMPT, COHORT.context())
        for pair, packet in there.items()
    }
    return both


@pytest.mark.parametrize("kind", [K.CONTEXT_U1, K.CONTEXT_REQUEST], ids=lambda k: k.name)
def test_shares_sealed_under_another_context_do_not_open(kind: Check) -> None:
    """SEALS_CONTEXT and SEALS_OPEN: the model's site that was told another request is in no U2 of this one's."""
    request = (1, 1, 2, 1)  # S03 apart
    full, off = u2s(request=request), u2s(K.SEALS_CONTEXT, request=request)
    assert all(not u2 >> 3 & 1 for u2 in full)
    refused = off - full
    assert refused
    assert refused <= u2s(K.SEALS_OPEN, request=request) - full
    packets = elsewhere(other_context(kind))
    assert {masked(u2, packets) for u2 in refused} == {REFUSED[K.SEALS_OPEN]} == {REFUSED[K.SEALS_CONTEXT]}
    assert {masked(u2, packets) for u2 in full} == {None}


def seeds(side: Side, sharers: int, site: str, other: str) -> bytes:
    private = COHORT.secrets[side.site].mask
    return pair_mask(private, COHORT.adverts[other].mask, ATTEMPT, side.context, names(sharers), site, other)[1]


def test_seeds_of_pairs_bind_context_sharers_and_names() -> None:
    """SEEDS_CONTEXT, SEEDS_U2, SEEDS_NAMES: two sites that were told other things share no mask; the same, the same."""
    one, two = SIDES["S02"], SIDES["S03"]
    assert seeds(one, ALL, "S02", "S03") == seeds(two, ALL, "S03", "S02")
    for kind in (K.CONTEXT_U1, K.CONTEXT_REQUEST):
        assert seeds(one, ALL, "S02", "S03") != seeds(replace(two, context=other_context(kind)), ALL, "S03", "S02")
    assert seeds(one, ALL, "S02", "S03") != seeds(two, ALL & ~1, "S03", "S02")
    # S00 shows S03's mask key as its own: the pair with it has the same two keys, and another seed.
    private, shown = COHORT.secrets["S02"].mask, COHORT.adverts["S03"].mask
    pair = [pair_mask(private, shown, ATTEMPT, one.context, names(ALL), "S02", other)[1] for other in ("S03", "S00")]
    assert pair[0] != pair[1]


def test_a_finding_that_too_few_sharers_declare_is_zeroed() -> None:
    """FINDING_U2, for every U2 that the site accepts."""
    declared, side = sum(1 << site for site in LABELLING), SIDES["S02"]
    outcomes = set()
    for u2 in u2s():
        expected = model.zeroed(cohort(declared=declared), u2)
        assert side.zeroed(["Nodule"], names(u2)) == ["Nodule"] * expected
        outcomes.add(expected)
    assert outcomes == {False, True}
    assert not any(model.zeroed(cohort(K.FINDING_U2, declared=declared), u2) for u2 in u2s())


# -- signers


def signatures(signers: Iterable[str], u2: int, u3: int, context: bytes) -> dict[str, str]:
    fields = messages.survivors_fields(ATTEMPT, context, names(u2), names(u3))
    return {name: signing.sign(identity(name), signing.SURVIVORS, fields).hex() for name in signers}


def unmask(given: dict[str, str], u2: int = ALL, u3: int = ALL) -> str | None:
    return code_of(lambda: SIDES["S02"].check_signers(names(u2), names(u3), given))


@pytest.mark.parametrize("u3", [ALL, ALL & ~1, ALL & ~(1 << 3)], ids=["all", "without-the-colluder", "without-S03"])
def test_a_threshold_of_survivors_signs(u3: int) -> None:
    """SIGNERS, SIGNERS_DISTINCT and SIGNERS_IN_U3, for every set of signers."""
    for size in range(N + 1):
        for signers in combinations(range(N), size):
            given = signatures(names(signers), ALL, u3, COHORT.context())
            inside = sum(1 << site for site in signers) & ~u3 == 0
            assert unmask(given, u3=u3) == (None if inside and size >= T else REFUSED[K.SIGNERS])


@pytest.mark.parametrize(
    ("kind", "u2", "u3", "context"),
    [
        (K.SIGNED_CONTEXT, ALL, ALL, other_context(K.CONTEXT_REQUEST)),
        (K.SIGNED_U2, ALL & ~1, ALL, COHORT.context()),
        (K.SIGNED_U3, ALL, ALL & ~1, COHORT.context()),
    ],
    ids=lambda value: value.name if isinstance(value, Check) else "",
)
def test_a_signature_over_something_else_is_refused(kind: Check, u2: int, u3: int, context: bytes) -> None:
    mine = signatures(names(ALL), ALL, ALL, COHORT.context())
    assert unmask(mine) is None
    assert unmask(mine | signatures(["S03"], u2, u3, context)) == REFUSED[kind]
    told = attempt(kind)
    digests = {told.digest(ME - C, ALL, ALL), attempt().digest(ME - C, ALL, ALL)}
    assert len(digests) == 2  # the model's digest has it, unless the check is off


# -- beyond an attempt


def test_no_key_is_of_two_attempts() -> None:
    """FRESH_KEYS: what a site makes an attempt of is new each time."""
    first, second = Secrets.fresh(), Secrets.fresh()
    assert not {first.cipher, first.mask, first.seed} & {second.cipher, second.mask, second.seed}
    assert keys.public(first.cipher) != keys.public(second.cipher)


def test_the_parameters_are_those_of_the_roster() -> None:
    """ROSTER_N: a larger or smaller number told gives the model's site another threshold, and the code's none."""
    told = model.Told(0b111, 0, (0,), 1)
    assert model.threshold(cohort(), told) == T == Parameters.of(N, C).t
    assert model.threshold(cohort(K.ROSTER_N), told) < T
    assert COHORT.sites.sites.keys() == set(names(ALL))
    assert isinstance(next(iter(COHORT.sites.sites.values())), Keys)
