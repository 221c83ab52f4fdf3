"""Who is at fault: a wrong share names its holder, a wrong secret its dealer, and no honest site is blamed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ProtocolError
from chexfound.secagg import keys, shamir
from chexfound.secagg.coordinator import BlameError, accused
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Opened
from chexfound.secagg.parameters import Parameters
from tests.secagg.cohort import Cohort, answers, deal, identity, packets_to

# n = 5, c = 1, t = 4.  S04 shares, and is lost after it.
COHORT = Cohort(n=5)
NAMES, SURVIVORS = COHORT.names, COHORT.names[:4]
SIDES = COHORT.sides()
PACKETS = deal(SIDES)
ANSWERS = answers(SIDES, PACKETS, NAMES, SURVIVORS)


def test_a_threshold_opens_what_lies_on_the_sum() -> None:
    opening = COHORT.opening(PACKETS, NAMES, SURVIVORS)
    for number, name in enumerate(SURVIVORS):
        assert not opening.enough
        with pytest.raises(ProtocolError, match=f"{number} sites opened their shares; it takes 4") as caught:
            opening.masks()
        assert not isinstance(caught.value, BlameError)  # which would be of an honest dealer
        opening.add(name, ANSWERS[name])
    assert opening.enough
    told = {name: dict((seed, sign) for sign, seed in SIDES[name].masks(NAMES)) for name in SURVIVORS}
    left: dict[bytes, int] = {}
    for masks in told.values():
        for seed, sign in masks.items():
            left[seed] = left.get(seed, 0) + sign
    assert {seed: sign for sign, seed in opening.masks()} == {seed: sign for seed, sign in left.items() if sign}


def test_any_threshold_opens_the_same() -> None:
    opened = answers(SIDES, PACKETS, NAMES, NAMES)
    found = set()
    for some in itertools.combinations(NAMES, 4):
        opening = COHORT.opening(PACKETS, NAMES, NAMES)
        for name in some:
            opening.add(name, opened[name])
        found.add(tuple(sorted(opening.masks())))
    assert len(found) == 1


# -- a holder


def spoiled(one: Opened, **changes: str) -> Opened:
    return replace(one, **changes)


HOLDERS = {
    "another share": lambda told: told | {"S00": spoiled(told["S00"], share="0" * 66)},
    "a share of no field": lambda told: told | {"S00": spoiled(told["S00"], share="f" * 66)},
    "another salt": lambda told: told | {"S00": spoiled(told["S00"], salt="0" * 64)},
    "a share of another dealer": lambda told: told | {"S00": told["S02"]},
    "the other kind, told so": lambda told: told | {"S00": MASK_OF_S00},
    "the other kind, told as the right one": lambda told: told | {"S00": spoiled(MASK_OF_S00, kind="seed")},
    "the right share, told as the other kind": lambda told: told | {"S00": spoiled(told["S00"], kind="mask")},
    "the lost site's seed": lambda told: told | {"S04": SEED_OF_S04},
    "one less": lambda told: {name: one for name, one in told.items() if name != "S00"},
    "one more": lambda told: told | {"S99": told["S00"]},
    "none": lambda told: {},
}
BOTH = SIDES["S01"].check_sharers(NAMES, packets_to(PACKETS, "S01", NAMES))
MASK_OF_S00, SEED_OF_S04 = BOTH["S00"]["mask"], BOTH["S04"]["seed"]


@pytest.mark.parametrize("spoil", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_wrong_share_names_its_holder_and_is_not_used(spoil) -> None:
    opening = COHORT.opening(PACKETS, NAMES, SURVIVORS)
    with pytest.raises(BlameError) as caught:
        opening.add("S01", spoil(ANSWERS["S01"]))
    assert caught.value.site == "S01"
    for name in ("S00", "S02", "S03"):
        opening.add(name, ANSWERS[name])
    assert not opening.enough
    opening.add("S01", ANSWERS["S01"])
    assert opening.masks()


# -- a dealer


def dealt_wrongly(kind: str, change) -> tuple[dict, str]:
    """All packets, of which the one dealer's are of another secret or of no secret, all as it signed them."""
    dealer = "S00" if kind == "seed" else "S04"  # of the one that survives the seed is opened, of the other the mask
    side = SIDES[dealer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shamir, "split", change(kind, shamir.split, COHORT.secrets[dealer]))
        dealt = {(dealer, packet.holder): packet for packet in side.deal()}
    return {**PACKETS, **dealt}, dealer


def another_secret(kind: str, split, secrets: Secrets):
    of = secrets.seed if kind == "seed" else secrets.mask
    return lambda secret, points, t: split(b"\7" * 32 if secret == of else secret, points, t)


def another_polynomial_for_one(kind: str, split, secrets: Secrets):
    """The share of the second holder does not lie on the polynomial of the others."""
    of = secrets.seed if kind == "seed" else secrets.mask

    def deal_it(secret, points, t):
        shares = split(secret, points, t)
        return {**shares, points[1]: shares[points[2]]} if secret == of else shares

    return deal_it


@pytest.mark.parametrize("kind", ["seed", "mask"])
@pytest.mark.parametrize("change", [another_secret, another_polynomial_for_one])
def test_shares_of_another_secret_name_their_dealer(kind: str, change) -> None:
    packets, dealer = dealt_wrongly(kind, change)
    opening = COHORT.opening(packets, NAMES, SURVIVORS)
    for name, opened in answers(SIDES, packets, NAMES, SURVIVORS).items():  # no holder can see it
        opening.add(name, opened)
    with pytest.raises(BlameError, match="dealt shares of") as caught:
        opening.masks()
    assert caught.value.site == dealer


def test_shares_of_no_secret_name_their_dealer() -> None:
    """A polynomial whose value at 0 is over 2**256: no 32 bytes are."""

    def over(kind: str, split, secrets: Secrets):
        def deal_it(secret, points, t):
            shares = split(secret, points, t)
            if secret != secrets.seed:
                return shares
            add = shamir.PRIME - 1 - int.from_bytes(secret, "big")
            raised = {p: (int.from_bytes(s, "big") + add) % shamir.PRIME for p, s in shares.items()}
            return {p: s.to_bytes(33, "big") for p, s in raised.items()}

        return deal_it

    packets, dealer = dealt_wrongly("seed", over)
    opening = COHORT.opening(packets, NAMES, SURVIVORS)
    for name, opened in answers(SIDES, packets, NAMES, SURVIVORS).items():
        opening.add(name, opened)
    with pytest.raises(BlameError, match="dealt shares of no secret") as caught:
        opening.masks()
    assert caught.value.site == dealer


def test_a_mask_key_is_held_against_the_advert() -> None:
    """Clamping makes several private keys of one public one; any of them gives the same masks, and none is blamed."""
    private = bytearray(COHORT.secrets["S04"].mask)
    private[0] ^= 1  # of the three lowest bits, which X25519 does not read
    assert keys.public(bytes(private)) == COHORT.adverts["S04"].mask
    packets, _ = dealt_wrongly("mask", lambda kind, split, secrets: lambda secret, points, t: split(
        bytes(private) if secret == secrets.mask else secret, points, t
    ))  # fmt: skip
    opening, honest = (COHORT.opening(dealt, NAMES, SURVIVORS) for dealt in (packets, PACKETS))
    for one, dealt in ((opening, packets), (honest, PACKETS)):
        for name, opened in answers(SIDES, dealt, NAMES, SURVIVORS).items():
            one.add(name, opened)
    assert opening.masks() == honest.masks()


def test_blame_is_no_text_of_a_site() -> None:
    assert str(BlameError("S00", "did it")) == "site 'S00' did it"
    assert BlameError("S00", "did it").code == "protocol"
    assert identity("S00").public_key()  # the cohort's keys are real


# -- complaints


@st.composite
def complaints_with_liars(draw: st.DrawFn) -> tuple[dict[str, list[str]], set[str], int]:
    """What sites complain of when at most c lie: as dealers to whom they will, and as holders of whom they will."""
    n = draw(st.integers(3, 12))
    names = [f"S{number:02d}" for number in range(n)]
    c = draw(st.integers(0, Parameters.of(n).c + 1).filter(lambda c: c <= n - 2))
    liars = set(draw(st.lists(st.sampled_from(names), max_size=max(c, 1), unique=True)))
    complaints: dict[str, list[str]] = {}
    for name in names:
        if name in liars:
            against = draw(st.lists(st.sampled_from(names), max_size=n))
        else:
            against = [liar for liar in sorted(liars) if draw(st.booleans())]  # whose shares did not open here
        if against:
            complaints[name] = against
    return complaints, liars, c


@given(complaints_with_liars())
def test_an_honest_site_is_never_at_fault(case: tuple[dict[str, list[str]], set[str], int]) -> None:
    complaints, liars, c = case
    at_fault, doubtful = accused(complaints, c)
    assert set(at_fault) <= liars
    assert not set(at_fault) & set(doubtful)
    for site, dealers in complaints.items():  # every complaint is settled: one of the two is out of the next attempt
        for dealer in dealers:
            assert {site, dealer} & (set(at_fault) | set(doubtful))
    for name in doubtful:  # and no honest site is left out but beside a liar
        beside = set(complaints.get(name, [])) | {site for site, dealers in complaints.items() if name in dealers}
        assert name in liars or beside & liars & set(doubtful)


@given(complaints_with_liars(), st.randoms(use_true_random=False))
def test_the_order_of_complaints_does_not_matter(case, random) -> None:
    complaints, _, c = case
    turned = [(site, random.sample(dealers, len(dealers))) for site, dealers in complaints.items()]
    random.shuffle(turned)
    assert accused(dict(turned), c) == accused(complaints, c)


@pytest.mark.parametrize(
    ("complaints", "c", "at_fault", "doubtful"),
    [
        ({}, 1, [], []),
        ({"A": ["B"]}, 1, [], ["A", "B"]),
        ({"A": ["B"], "C": ["B"]}, 1, ["B"], []),
        ({"A": ["B"], "C": ["B"]}, 2, [], ["A", "B", "C"]),
        ({"A": ["B", "C"]}, 1, ["A"], []),
        ({"A": ["B", "B"]}, 1, [], ["A", "B"]),
        ({"A": ["B", "C"], "D": ["B"]}, 1, ["A", "B"], []),  # two liars, where one was reckoned with
        ({"A": ["B"], "C": ["D"]}, 2, [], ["A", "B", "C", "D"]),
        ({"A": ["A"]}, 1, [], ["A"]),
        ({"A": ["C"], "B": ["C"]}, 0, ["C"], []),  # no colluder, and yet one site is broken: it alone is named
        ({"A": ["B"]}, 0, [], ["A", "B"]),
        ({"A": ["B", "C"]}, 0, ["A"], []),
    ],
)
def test_who_is_left_out(complaints, c, at_fault, doubtful) -> None:
    assert accused(complaints, c) == (at_fault, doubtful)
