"""The symbolic model of model.py is the code's: on the same traces both accept and both refuse, check by check.

Here one check stands alone; test_traces.py plays whole random strategies, and test_second_asking.py asks twice.
Site 0 of the model colludes and is S00 of the cohort; names that it invents are strangers, each with keys of its own.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from types import ModuleType
from typing import Any

import pytest

from chexfound.errors import REFUSALS, RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Keys
from chexfound.secagg import keys, messages, site
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Packet
from chexfound.secagg.parameters import MINIMUM, Parameters
from chexfound.secagg.site import Side, advertise, pair_mask
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
    K.ROSTER_N: "secagg.parameters",  # test_second_asking.py
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
    K.ONE_U2: "secagg.repeat",  # likewise
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
    K.JOURNAL: "secagg.differencing",  # likewise
    K.FRESH_KEYS: None,
}

# Every refusal in the text of site.py, by the words that it begins with, and the check that it makes.  None: the model
# has no such case.  Its sets hold nobody twice, and one packet comes of each; blame for wrong shares is not in it.
RAISED: dict[str, Check | None] = {
    "a site stands among the adverts twice": None,
    "this site's own advert is not among them": K.U1_OWN,
    " sites advertise, fewer than the threshold ": K.U1_SIZE,
    "a key in a second encoding": K.U1_KEYS,
    "two adverts have a key in common": K.U1_KEYS,
    "sites among the sharers that did not advertise": K.U2_IN_U1,
    "this site is not among the sharers": K.U2_OWN,
    " sharers, fewer than the threshold ": K.U2_SIZE,
    "the packets are not one of each sharer": None,
    "a packet of  for another site": None,
    "WrongSharesError": K.SEALS_OPEN,
    "the shares of  are not two": None,
    "a share of  is not the one that it signed": None,
    "sites among the survivors that did not share": K.U3_IN_U2,
    "this site is not among the survivors": K.U3_OWN,
    " survivors, fewer than ": K.U3_SIZE,
    "fewer than  survivors label ": K.FINDING_U3,
    "a signature of a site that is not among the survivors": K.SIGNERS_IN_U3,
    " signatures, fewer than ": K.SIGNERS,
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


def begins(node: ast.stmt) -> tuple[str, str] | None:
    """The words that a refusal begins with, of RAISED where they are there, and its code; None for what is none."""
    if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
        return None
    assert isinstance(node.exc.func, ast.Name)
    if node.exc.func.id != "RefusedError":
        return node.exc.func.id, "secagg.shares"
    code, words = node.exc.args
    parts = words.values if isinstance(words, ast.JoinedStr) else [words]
    said = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
    return next((one for one in RAISED if said.startswith(one)), said), ast.literal_eval(code)


def refusals(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """All refusals of some code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and (found := begins(node)) is not None:
            yield found


def without(check: Check) -> ModuleType:
    """site.py without the lines that make a check."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.stmt:  # noqa: N802
            self.generic_visit(node)
            found = begins(node.body[0])
            return ast.Pass() if found is not None and RAISED[found[0]] is check else node

    tree = Drop().visit(ast.parse(inspect.getsource(site)))
    mutant = ModuleType(site.__name__)
    exec(compile(ast.fix_missing_locations(tree), "site.py without a check", "exec"), vars(mutant))  # noqa: S102
    return mutant


def test_every_check_is_mapped() -> None:
    assert set(REFUSED) == set(Check)
    assert set(filter(None, REFUSED.values())) <= set(REFUSALS)


def test_every_refusal_of_a_site_is_some_checks_and_by_its_word() -> None:
    found = list(refusals(ast.parse(inspect.getsource(site))))
    assert sorted(words for words, _ in found) == sorted(RAISED)
    words = {(check, code) for begin, code in found if (check := RAISED[begin]) is not None}
    assert words == {(check, REFUSED[check]) for check, _ in words}


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


def share(told: Told, code: ModuleType = site) -> str | None:
    """How the site judges a U1, or one that has some other `code`."""
    u1, false = told
    adverts = [
        forged(site) if false >> site & 1 else stranger(site) if site >= N else COHORT.adverts[names([site])[0]]
        for site in range(N + T)
        if u1 >> site & 1
    ]
    own = COHORT.adverts[names([ME])[0]]
    return code_of(lambda: code.check_adverts(adverts, own, ATTEMPT, COHORT.sites, COHORT.parameters))


def u1s(*off: Check) -> set[Told]:
    return {(u1, false) for u1, false, _ in model.told_options(cohort(*off), ME)}


# -- U2


def masked(u2: int, code: ModuleType = site, packets: dict[tuple[str, str], Packet] | None = None) -> str | None:
    """How the site judges a U2 after a U1 of all, with a packet of each."""
    me, sharers = names([ME])[0], names(u2)
    there = {**PACKETS, **(packets or {})}
    given = [there.get((dealer, me)) or replace(PACKETS[me, me], dealer=dealer) for dealer in sharers]
    return code_of(lambda: code.Side(**vars(SIDES[me])).check_sharers(sharers, given))


def attempt(*off: Check, request: Sequence[int] = (1,) * (N - C)) -> model.Attempt:
    return model.Attempt(cohort(*off), [model.Told(ALL, 0, (0,), one) for one in request])


def u2s(*off: Check, request: Sequence[int] = (1,) * (N - C)) -> set[int]:
    return {u2 for u2 in attempt(*off, request=request).u2_options[ME - C] if u2 is not None}


# -- U3


def consistency(trace: tuple[int, int], code: ModuleType = site) -> str | None:
    """How the site judges a U3 after a U2."""
    u2, u3 = trace
    side = code.Side(**vars(SIDES[names([ME])[0]]))
    summed = [finding for finding in ["Nodule"] if finding not in side.zeroed(["Nodule"], names(u2))]
    return code_of(lambda: side.sign_survivors(names(u2), names(u3), summed))


def u3s(*off: Check) -> set[tuple[int, int]]:
    declared = sum(1 << site for site in LABELLING)
    one = cohort(*off, declared=declared)
    found = [(u2, u3) for u2 in u2s() for u3 in model.u3_options(one, ME, u2, ALL, T)]
    return {(u2, u3) for u2, u3 in found if u3 is not None}


STAGES: dict[str, tuple[Callable[..., set[Any]], Callable[..., str | None], list[Check]]] = {
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


LONE = [check for _, _, checks in STAGES.values() for check in checks if check in RAISED.values()]


@pytest.mark.parametrize("check", LONE, ids=lambda check: check.name)
def test_a_site_without_a_check_accepts_what_only_it_refuses(check: Check) -> None:
    """So it is this check's lines that refuse, and the test above fails without them."""
    accepted, judge, _ = next(stage for stage in STAGES.values() if check in stage[2])
    traces = [trace for trace in accepted(check) - accepted() if not strange(trace) or check is K.U2_IN_U1]
    mutant = without(check)
    judged = {judge(trace, mutant) for trace in traces}
    assert judged == ELSE.get(check, {None})


# What else refuses: an own advert with other keys is signed by nobody (the model leaves it to U1_OWN alone), and a
# sharer that did not advertise has no key by which its packet is signed.
ELSE = {K.U1_OWN: {None, "secagg.signature"}, K.U2_IN_U1: {"secagg.cohort"}}


def strange(trace: int | tuple[int, ...]) -> bool:
    """Whether names of no roster are in it, which have no advert to be looked up."""
    return any(one >> N for one in (trace if isinstance(trace, tuple) else (trace,)))


def twin(key: str) -> str:
    """The second encoding of an X25519 key, whose top bit nobody reads (the model's `twin_keys`)."""
    raw = bytes.fromhex(key)
    return (raw[:31] + bytes([raw[31] | 0x80])).hex()


@pytest.mark.parametrize("encoded", [str, twin], ids=["as-it-is", "in-a-second-encoding"])
def test_keys_that_two_adverts_share_are_refused(encoded: Callable[[str], str]) -> None:
    """The model's `keys`: the colluder shows an honest site's mask key as its own."""
    own, key = COHORT.adverts["S02"], encoded(COHORT.adverts["S03"].mask)
    copied = replace(COHORT.adverts["S00"], mask=key).signed(identity("S00"), ATTEMPT)
    told = cohort(copies=True, twin_keys=False)
    assert all(shown == (0,) for u1, _, shown in model.told_options(told, ME) if u1 == ALL)
    off = replace(told, off=frozenset({K.U1_KEYS}))
    assert any(shown == (3,) for u1, _, shown in model.told_options(off, ME) if u1 == ALL)
    adverts = [copied if advert.site == "S00" else advert for advert in COHORT.adverts.values()]
    for code, word in [(site, REFUSED[K.U1_KEYS]), (without(K.U1_KEYS), None)]:
        judge = code.check_adverts
        assert code_of(lambda: judge(adverts, own, ATTEMPT, COHORT.sites, COHORT.parameters)) == word  # noqa: B023


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
    """What S03 deals, all of it for this site's context but the seals, which are under another."""
    resealed = {}
    for pair, packet in deal({"S03": SIDES["S03"]}).items():
        dealer, holder = pair
        ends = COHORT.secrets[holder].cipher, COHORT.adverts[dealer].cipher
        text = keys.unseal(*ends, ATTEMPT, COHORT.context(), pair, bytes.fromhex(packet.sealed))
        ends = COHORT.secrets[dealer].cipher, COHORT.adverts[holder].cipher
        sealed = keys.seal(*ends, ATTEMPT, context, pair, text).hex()
        resealed[pair] = replace(packet, sealed=sealed).signed(identity(dealer), ATTEMPT, COHORT.context())
    return resealed


@pytest.mark.parametrize("kind", [K.CONTEXT_U1, K.CONTEXT_REQUEST], ids=lambda k: k.name)
def test_shares_sealed_under_another_context_do_not_open(kind: Check) -> None:
    """SEALS_CONTEXT and SEALS_OPEN: the model's site that was told another request is in no U2 of this one's."""
    request = (1, 1, 2, 1)  # S03 apart
    full, off = u2s(request=request), u2s(K.SEALS_CONTEXT, request=request)
    assert all(not u2 >> 3 & 1 for u2 in full)
    refused = off - full
    assert refused
    assert refused <= u2s(K.SEALS_OPEN, request=request) - full
    packets, open_ = elsewhere(other_context(kind)), without(K.SEALS_OPEN)
    assert {masked(u2, packets=packets) for u2 in refused} == {REFUSED[K.SEALS_OPEN]} == {REFUSED[K.SEALS_CONTEXT]}
    assert {masked(u2, packets=packets) for u2 in full} == {None}
    assert {masked(u2, packets=elsewhere(COHORT.context())) for u2 in refused} == {None}
    assert {masked(u2, open_, packets) for u2 in refused} == {None}


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


def unmask(given: dict[str, str], u2: int = ALL, u3: int = ALL, code: ModuleType = site) -> str | None:
    return code_of(lambda: code.Side(**vars(SIDES["S02"])).check_signers(names(u2), names(u3), given))


@pytest.mark.parametrize("u3", [ALL, ALL & ~1, ALL & ~(1 << 3)], ids=["all", "without-the-colluder", "without-S03"])
def test_a_threshold_of_survivors_signs(u3: int) -> None:
    """SIGNERS, SIGNERS_DISTINCT and SIGNERS_IN_U3, for every set of signers; and a site without one of them."""
    few, outside = without(K.SIGNERS), without(K.SIGNERS_IN_U3)
    for size in range(N + 1):
        for signers in combinations(range(N), size):
            given = signatures(names(signers), ALL, u3, COHORT.context())
            inside = sum(1 << site for site in signers) & ~u3 == 0
            assert unmask(given, u3=u3) == (None if inside and size >= T else REFUSED[K.SIGNERS])
            assert (unmask(given, u3=u3, code=few) is None) == inside
            assert (unmask(given, u3=u3, code=outside) is None) == (size >= T)


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
