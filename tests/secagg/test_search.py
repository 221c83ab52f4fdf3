"""Every strategy of a coordinator against sites that make every check, and against sites that leave some out.

Each check has a line in `ATTACKS`, an attack that works once it is off, or one in `IMPLIED`, where the search finds
none. Many checks stand behind another: off alone they are harmless, and the attack needs a second one off. Their lines
name it, and the search shows that the second alone is harmless too, so that neither can be dropped as the other's copy.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tests.secagg.model import (
    Attempt,
    Check,
    Cohort,
    Strategy,
    Told,
    differencing,
    judge,
    kept_keys,
    sample,
    search,
    too_much,
)

PARAMETERS = [(4, 0, 3), (4, 1, 3), (5, 1, 4), (5, 2, 4)]
SMALL = [(4, 1, 3), (5, 2, 4)]

K = Check
Sums = list[set[int]]

# Check, what else is off, (n, c, t), what else differs, the sites of each sum that is opened (more than one: the
# sums and all differences of them). Sites 0 to c - 1 collude.
ATTACKS: list[tuple[Check, set[Check], tuple[int, int, int], dict[str, Any], Sums]] = [
    # A cohort of four at a roster of five, with the t of four: fewer honest sites than promised. Disjoint views: below.
    (K.ROSTER_N, set(), (5, 1, 4), {}, [{1, 2}]),
    # Invented sites, or replaced keys: the coordinator holds the victim's shares and knows its pair masks.
    (K.U1_ROSTER, set(), (4, 1, 3), {}, [{1}, {2}, {3}]),
    (K.U1_SIGNED, set(), (4, 1, 3), {}, [{1, 2}, {3}]),
    # A site that does not see itself in U1, or sees another key of its own, is in two cohorts at once.
    (K.U1_OWN, {K.SEALS_CONTEXT, K.SIGNERS}, (4, 1, 3), {}, [{1, 2}, {3}]),
    (K.CONTEXT_U1, {K.U1_OWN, K.SIGNERS}, (4, 1, 3), {}, [{1, 2}, {3}]),
    # A colluder shows the victim's mask key: the pair's mask cancels. Where keys must be distinct it shows a second
    # encoding of that key; distinctness helps only against the same bytes, so it is shown without second encodings.
    (K.SEEDS_NAMES, set(), (4, 1, 3), {}, [{1}]),
    (K.SEEDS_NAMES, set(), (5, 1, 4), {}, [{1, 2}]),
    (K.SEEDS_NAMES, set(), (5, 2, 4), {}, [{2}]),
    (K.SEEDS_NAMES, {K.U1_KEYS}, (4, 1, 3), {"twin_keys": False}, [{1}]),
    (K.U1_KEYS, {K.SEEDS_NAMES}, (4, 1, 3), {"twin_keys": False}, [{1}]),
    # Pasquini et al. 2022: all but the victim train from a model that makes their updates known.
    *((K.CONTEXT_REQUEST, set(), p, {}, [{p[0] - 1}]) for p in PARAMETERS),
    (K.SEALS_CONTEXT, {K.SEEDS_CONTEXT}, (4, 1, 3), {}, [{3}]),
    (K.SEEDS_CONTEXT, {K.SEALS_CONTEXT}, (4, 1, 3), {}, [{3}]),
    # The victim masks with colluders (or names that nobody has) alone; the others sign and unmask it with all.
    *((K.U2_IN_U1, set(), p, {}, [{p[0] - 1}]) for p in PARAMETERS),
    *((K.U2_SIZE, set(), p, {}, [{p[1]}]) for p in PARAMETERS),
    (K.U2_OWN, {K.U3_IN_U2}, (4, 1, 3), {}, [{1}]),
    # The same site's input under two U2.
    (K.ONE_U2, set(), (4, 1, 3), {}, [{1}, {2}, {3}]),
    # Survivor sets of one site each: votes of different signers add up.
    (K.U3_IN_U2, {K.SIGNERS}, (4, 1, 3), {}, [{2}]),
    (K.U3_OWN, {K.SIGNERS_IN_U3}, (4, 1, 3), {}, [{1}]),
    (K.U3_OWN, {K.SIGNERS_IN_U3}, (5, 2, 4), {}, [{2}]),
    (K.U3_SIZE, {K.SIGNERS}, (4, 1, 3), {}, [{1}]),
    (K.U3_SIZE, set(), (4, 0, 3), {"minimum": 4}, [{0, 1, 2}]),
    (K.SIGNERS, {K.U3_SIZE}, (4, 1, 3), {}, [{1}]),
    (K.SIGNERS_DISTINCT, {K.U3_SIZE}, (4, 1, 3), {}, [{1}]),
    (K.SIGNERS_IN_U3, {K.U3_OWN}, (4, 1, 3), {}, [{1}]),
    (K.SIGNED_U2, {K.U3_IN_U2}, (4, 1, 3), {}, [{1}]),
    (K.SIGNED_U3, {K.U3_SIZE, K.SIGNERS_IN_U3}, (4, 1, 3), {}, [{1}]),
    # Both shares of one site.
    (K.ONE_U3, {K.ONE_ANSWER}, (4, 1, 3), {}, [{1}, {2}, {3}]),
    (K.ONE_ANSWER, {K.ONE_U3}, (4, 1, 3), {}, [{1}, {2}, {3}]),
    # The third declaring site drops out between U2 and U3: of the finding's sum too few are left.
    (K.FINDING_U3, set(), (4, 0, 3), {"declared": 0b0111}, [{1, 2}]),
    (K.FINDING_U3, set(), (4, 1, 3), {"declared": 0b0111}, [{2}]),
    (K.FINDING_U3, set(), (5, 1, 4), {"declared": 0b0111}, [{2}]),
    (K.FINDING_U3, set(), (5, 2, 4), {"declared": 0b01111}, [{3}]),
]

# Checks without an attack in this model, alone or with one or two others off. They stay, and why:
IMPLIED = {
    # U2 >= t and U2 in U1 give it; a site should not deal shares of which t cannot come back.
    K.U1_SIZE,
    # The context in the seal, then in the seeds, does the work. An unopened share is a share that is not there when
    # the dealer drops out: going on risks the round, not a site.
    K.SEALS_OPEN,
    # Sites that mask under different U2 only lose the coordinator the sum. It makes a repeated mask impossible.
    K.SEEDS_U2,
    # U2 >= t, seals and seeds with the context leave one context with enough inputs. It names a split view early.
    K.SIGNED_CONTEXT,
    # "No unzeroed finding" refuses what is not zeroed; without zeroing a rare finding would stop every attempt.
    K.FINDING_U2,
}

SECOND_ATTEMPT = {K.JOURNAL, K.FRESH_KEYS}  # tests of their own below

# Checks that take a second one off.
BACKED = sorted(set(Check) - SECOND_ATTEMPT - {check for check, others, *_ in ATTACKS if not others})
BACKED.append(K.U3_SIZE)  # alone it is attacked where the site's own minimum is above t


def cohort(p: tuple[int, int, int], off: set[Check] | None = None, **more: Any) -> Cohort:
    n, c, t = p
    return Cohort(n=n, c=c, t=t, off=frozenset(off or ()), **more)


def label(case: tuple[Any, ...]) -> str:
    check, others, p, more, _ = case
    return "-".join([check.name, *(f"with-{o.name}" for o in sorted(others)), *map(str, p), *map(str, more)])


@pytest.mark.parametrize("p", PARAMETERS)
def test_with_all_checks_one_sum_over_t_minus_c_honest_sites_at_most(p: tuple[int, int, int]) -> None:
    result = search(cohort(p))
    assert result.attack is None, str(result.attack)
    assert result.strategies > 100
    assert result.opening > 10
    assert result.fewest == p[2] - p[1]  # the bound is reached: that many can be all


@pytest.mark.parametrize(
    ("p", "more"),
    [((4, 1, 3), "colluders_leave"), ((5, 2, 4), "colluders_leave"), ((4, 1, 3), "copies")],
)
def test_what_the_search_leaves_out_helps_no_coordinator(p: tuple[int, int, int], more: str) -> None:
    """Sets without some colluders, and keys copied from honest sites although seeds bind names."""
    result = search(replace(cohort(p), **{more: True}))
    assert result.attack is None, str(result.attack)
    assert result.strategies > search(cohort(p)).strategies


@pytest.mark.parametrize("case", ATTACKS, ids=label)
def test_without_a_check_there_is_an_attack(case: tuple[Check, set[Check], tuple[int, int, int], Any, Sums]) -> None:
    check, others, p, more, opened = case
    kept = cohort(p, others, **more)
    assert search(kept).attack is None  # while the check is on, nothing: it is this check that stops the attack
    attack = search(cohort(p, {check, *others}, **more)).attack
    assert attack is not None
    print(attack)
    assert attack.opened >= set(map(frozenset, opened)), str(attack)
    assert judge(attack.cohort, attack.strategy) == attack.sums
    try:  # the very strategy, against sites that make the check
        sums = judge(replace(kept, copies=True), attack.strategy)
    except ValueError:
        return  # refused
    assert not too_much(sums, kept.least)


@pytest.mark.parametrize("check", BACKED, ids=lambda check: check.name)
def test_a_check_that_another_one_backs_is_harmless_to_lose_alone(check: Check) -> None:
    for p in SMALL if check == K.U3_IN_U2 else PARAMETERS:  # four honest sites: 458,796 strategies, half a minute each
        result = search(cohort(p, {check}))
        assert result.attack is None, str(result.attack)
        assert result.opening > 10


@pytest.mark.parametrize("check", sorted(set(BACKED) - {K.U3_IN_U2}), ids=lambda check: check.name)
def test_a_findings_sum_needs_no_backed_check_alone(check: Check) -> None:
    """At (4, 1, 3): with one off, zeroing among them, the sum of a finding holds as many declaring honest sites."""
    for declaring in range(4):
        result = search(cohort((4, 1, 3), {check}, declared=(2 << declaring) - 1))
        assert result.attack is None, str(result.attack)


def test_every_check_is_accounted_for() -> None:
    attacked = {check for check, *_ in ATTACKS}
    assert attacked | IMPLIED | SECOND_ATTEMPT == set(Check)
    assert not attacked & IMPLIED


@pytest.mark.parametrize("check", sorted(IMPLIED - {K.FINDING_U2}), ids=lambda check: check.name)
def test_an_implied_check_stays_implied_when_others_fail(check: Check) -> None:
    """At (4, 1, 3), with each other check off that is harmless to lose alone."""
    for other in set(BACKED) - {check, K.U3_IN_U2}:
        assert search(cohort((4, 1, 3), {check, other})).attack is None, other


def test_without_zeroing_a_rare_finding_stops_the_attempt() -> None:
    everyone = Told(0b1111, 0, (0,), 1)
    for off, accepted in [(set(), 0b1111), ({K.FINDING_U2}, None)]:
        attempt = Attempt(cohort((4, 1, 3), off, declared=0b0011), [everyone] * 3)
        assert attempt.u3_options(0, 0b1111)[0] == accepted


@pytest.mark.parametrize("p", PARAMETERS)
def test_a_findings_sum_holds_as_many_declaring_honest_sites(p: tuple[int, int, int]) -> None:
    n, c, _ = p
    seen = set()
    for declaring in range(n - c + 1) if p in SMALL else [3 - min(c, 1)]:
        result = search(cohort(p, declared=(1 << c + declaring) - 1))
        assert result.attack is None, str(result.attack)
        seen.add(result.fewest)
    assert min(filter(None, seen)) == max(3, c + 2) - c


@pytest.mark.parametrize(("p", "opened"), [((4, 0, 2), 2), ((5, 1, 3), 2)])
def test_two_sums_where_2t_is_not_above_n_plus_c(p: tuple[int, int, int], opened: int) -> None:
    attack = search(cohort(p, minimum=2)).attack
    assert attack is not None
    assert len(attack.sums) == opened


def test_one_honest_site_where_t_minus_c_is_one() -> None:
    result = search(cohort((3, 2, 3)))
    assert result.attack is None  # over t - c honest sites, as promised: that is one
    assert result.fewest == 1


@pytest.mark.parametrize("p", [(4, 0, 3), (4, 1, 3), (5, 2, 4)])
def test_two_attempts(p: tuple[int, int, int]) -> None:
    tried, opened = differencing(cohort(p))
    assert tried > 100
    assert opened is None
    _, opened = differencing(cohort(p, {K.JOURNAL}))
    assert opened is not None
    assert len(opened) == 2  # two sums over the same updates, and so their difference
    tried, opened = kept_keys(cohort(p))
    assert tried > 100
    assert opened is None
    _, opened = kept_keys(cohort(p, {K.FRESH_KEYS}))
    assert opened is not None
    assert min(sum(map(bool, v)) for v in opened) == 1  # dropped in one attempt, unmasked in the other


@pytest.mark.parametrize("p", [(6, 1, 4), (7, 2, 5)])
def test_random_strategies_of_larger_cohorts(p: tuple[int, int, int]) -> None:
    result = sample(cohort(p), 10_000, random.Random(16))
    assert result.attack is None, str(result.attack)
    assert result.opening > 1000
    assert result.fewest == p[2] - p[1]
    for off in [{K.U2_SIZE}, {K.CONTEXT_REQUEST}, {K.SEALS_CONTEXT, K.SEEDS_CONTEXT}]:  # it does find attacks
        assert sample(cohort(p, off), 10_000, random.Random(16)).attack is not None


def test_disjoint_views_open_two_sums_if_n_is_the_number_told() -> None:
    """Two cohorts of three at a roster of five, each lawful for itself: t = 3 > (3 + 1) / 2, t - c = 2."""
    views = (0b00111, 0b00111, 0b11001, 0b11001)
    strategy = Strategy(tuple(Told(u1, 0, (0,), 1) for u1 in views), views, views)
    assert judge(cohort((5, 1, 4), {K.ROSTER_N}), strategy) == ((1, 1, 0, 0), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="site 1 refuses its U1"):
        judge(cohort((5, 1, 4)), strategy)


def names(*members: int) -> int:
    return sum(1 << i for i in members)


@pytest.mark.parametrize("check", [K.SIGNERS, K.ONE_U3, K.SIGNED_U3])
def test_nine_sites_without_one_signed_set_open_two(check: Check) -> None:
    """Each U3 has five sites, yet only two are in most: majorities site by site are no majority for a set."""
    nine = cohort((9, 0, 5), {check})
    told = (Told(names(*range(9)), 0, (), 1),) * 9
    u3 = (
        names(0, 1, 2, 3, 4),
        names(0, 1, 5, 6, 7),
        *(names(0, 1, *(2 + (k + d) % 7 for d in range(3))) for k in range(7)),
    )
    strategy = Strategy(told, (names(*range(9)),) * 9, u3)
    assert judge(nine, strategy) == ((1, 1, 0, 0, 0, 0, 0, 0, 0),)
    assert judge(replace(nine, off=frozenset()), strategy) == ()


def test_nine_sites_without_signers_open_one_if_share_lists_differ_too() -> None:
    """The victim masks with four that all others, and some of the four, then call dropped."""
    nine = cohort((9, 0, 5), {K.SIGNERS})
    told = (Told(names(*range(9)), 0, (), 1),) * 9
    u2 = (names(0, 1, 2, 3, 4), *(names(*range(9)),) * 8)
    u3 = (None, *(names(0, k, 5, 6, 7) for k in (1, 2, 3, 4)), *(names(0, 5, 6, 7, 8),) * 4)
    assert judge(nine, Strategy(told, u2, u3)) == ((1, 0, 0, 0, 0, 0, 0, 0, 0),)
    assert judge(replace(nine, off=frozenset()), Strategy(told, u2, u3)) == ()


def test_one_x25519_key_has_two_encodings() -> None:
    """What `twin_keys` assumes: RFC 7748, section 5: the top bit of the last byte is masked."""
    victim, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    key = victim.public_key().public_bytes_raw()
    twin = key[:31] + bytes([key[31] | 0x80])
    assert twin != key
    assert peer.exchange(X25519PublicKey.from_public_bytes(twin)) == peer.exchange(victim.public_key())


def test_an_honest_coordinator_opens_the_survivors_sum() -> None:
    told = (Told(0b11111, 0, (0,), 1),) * 4
    everyone, survivors = 0b11111, 0b01111
    assert judge(cohort((5, 1, 4)), Strategy(told, (everyone,) * 4, (everyone,) * 4)) == ((1, 1, 1, 1),)
    assert judge(cohort((5, 1, 4)), Strategy(told, (everyone,) * 4, (*(survivors,) * 3, None))) == ((1, 1, 1, 0),)
    with pytest.raises(ValueError, match="site 4 refuses its U3"):
        judge(cohort((5, 1, 4)), Strategy(told, (everyone,) * 4, (survivors,) * 4))
