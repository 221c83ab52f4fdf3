"""Every check that a site makes, in the order of the stages: what is refused, under which code, and what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from chexfound.errors import REFUSALS, RefusedError
from chexfound.identity import signing
from chexfound.secagg import keys, messages, site
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Attempt, Packet
from chexfound.secagg.site import Side, WrongSharesError, check_adverts
from tests.secagg.cohort import ATTEMPT, Cohort, deal, identity, packets_to

# n = 5, c = 1, t = 4: one of five may be lost.
COHORT = Cohort(n=5)
NAMES = COHORT.names
ME = "S02"
OWN = COHORT.adverts[ME]
SIDES = COHORT.sides()
SIDE = SIDES[ME]
PACKETS = deal(SIDES)
FOR_ME = packets_to(PACKETS, ME, NAMES)
LATER = replace(ATTEMPT, attempt=2)


@contextmanager
def refused(code: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """A refusal with that code, which is one of those that are told."""
    assert code in REFUSALS
    with pytest.raises(RefusedError) as caught:
        yield caught
    assert caught.value.code == code, caught.value


def test_points_are_places_in_the_roster_whoever_takes_part() -> None:
    assert [site.point(COHORT.sites, name) for name in NAMES] == [1, 2, 3, 4, 5]


# -- advertise


def test_an_advert_says_what_the_site_is_and_nothing_secret() -> None:
    cohort = Cohort(n=3, findings={"S00": ["Nodule", "Edema"]}, minimums={"S00": 3})
    advert, secrets = cohort.adverts["S00"], cohort.secrets["S00"]
    advert.verify(ATTEMPT, cohort.sites)
    assert (advert.cipher, advert.mask) == (keys.public(secrets.cipher), keys.public(secrets.mask))
    assert advert.commitment == messages.seed_commitment(ATTEMPT, "S00", secrets.seed)
    assert (advert.findings, advert.minimum, advert.state) == (["Edema", "Nodule"], 3, "")
    for secret in (secrets.cipher, secrets.mask, secrets.seed):
        assert secret.hex() not in repr(advert)


# -- share: U1


def others(change: dict[str, Advert | None]) -> list[Advert]:
    """All adverts, with some changed or left out."""
    return [advert for advert in ({**COHORT.adverts, **change}).values() if advert is not None]


def check(adverts: Sequence[Advert], attempt: Attempt = ATTEMPT) -> dict[str, Advert]:
    return check_adverts(adverts, OWN, attempt, COHORT.sites, COHORT.parameters)


def test_honest_adverts_pass_in_any_order_down_to_the_threshold() -> None:
    assert check(others({})) == COHORT.adverts
    assert check(list(reversed(others({})))) == COHORT.adverts
    for name in NAMES:
        if name != ME:
            assert set(check(others({name: None}))) == set(NAMES) - {name}


def signed(name: str, **changes: Any) -> Advert:
    """A changed advert that its site did sign."""
    return replace(COHORT.adverts[name], **changes).signed(identity(name), ATTEMPT)


def again(key: str) -> str:
    """The same key to X25519, which does not read the top bit."""
    whole = bytearray.fromhex(key)
    whole[-1] |= 0x80
    return whole.hex()


STRANGER = replace(signed("S01"), site="S77", cipher="1" * 64, mask="2" * 64).signed(identity("S77"), ATTEMPT)
COHORTS = {
    "too few": others({"S00": None, "S01": None}),
    "a site twice": [*others({}), COHORT.adverts["S01"]],
    "a site twice, with other keys": [*others({}), signed("S01", cipher="1" * 64, mask="2" * 64)],
    "this site twice": [*others({}), OWN],
    "without this site": others({ME: None}),
    "this site with another key": others({ME: replace(OWN, mask="1" * 64)}),
    "this site with another key, signed": others({ME: signed(ME, mask="1" * 64)}),
    "this site with another label": others({ME: signed(ME, findings=["Edema"])}),
    "this site with another minimum": others({ME: signed(ME, minimum=0)}),
    "this site with another state": others({ME: signed(ME, state="1" * 64)}),
    "this site with another commitment": others({ME: signed(ME, commitment="1" * 64)}),
    "a stranger": [*others({}), STRANGER],
    "a stranger in another's place": [*others({"S01": None}), STRANGER],
    "this site's mask key for another": others({"S01": signed("S01", mask=OWN.mask)}),
    "this site's cipher key for another": others({"S01": signed("S01", cipher=OWN.cipher)}),
    "another's key for both": others({"S01": signed("S01", mask=COHORT.adverts["S03"].mask)}),
    "another's cipher key for a mask": others({"S01": signed("S01", mask=COHORT.adverts["S03"].cipher)}),
    "one key for two uses": others({"S01": signed("S01", mask=COHORT.adverts["S01"].cipher)}),
    "another's key in a second encoding": others({"S01": signed("S01", mask=again(COHORT.adverts["S03"].mask))}),
    "nobody": [],
}


@pytest.mark.parametrize("adverts", COHORTS.values(), ids=COHORTS.keys())
def test_another_cohort_is_refused(adverts: list[Advert]) -> None:
    with refused("secagg.cohort"):
        check(adverts)


FORGED = {
    "a key changed": replace(COHORT.adverts["S01"], mask="1" * 64),
    "a label added": replace(COHORT.adverts["S01"], findings=["Edema"]),
    "no signature": replace(COHORT.adverts["S01"], signature=""),
    "signed by another": replace(COHORT.adverts["S01"], mask="1" * 64).signed(identity("S03"), ATTEMPT),
    "of another attempt": COHORT.adverts["S01"].signed(identity("S01"), LATER),
    "of another run": COHORT.adverts["S01"].signed(identity("S01"), replace(ATTEMPT, run=8)),
}


@pytest.mark.parametrize("advert", FORGED.values(), ids=FORGED.keys())
def test_a_word_that_a_site_did_not_say_is_refused(advert: Advert) -> None:
    with refused("secagg.signature"):
        check(others({"S01": advert}))


def test_adverts_of_the_last_attempt_are_refused() -> None:
    own = OWN.signed(identity(ME), LATER)
    with refused("secagg.signature"):
        check_adverts(others({ME: own}), own, LATER, COHORT.sites, COHORT.parameters)


def test_a_key_of_small_order_gets_no_share() -> None:
    adverts = {**COHORT.adverts, "S01": signed("S01", cipher="0" * 64)}
    check(list(adverts.values()))
    with refused("secagg.cohort"):
        replace(SIDE, adverts=adverts).deal()


# -- share: the packets


def test_a_packet_for_each_site_of_u1_itself_among_them() -> None:
    dealt = SIDE.deal()
    assert [packet.holder for packet in dealt] == NAMES
    assert {packet.dealer for packet in dealt} == {ME}
    for packet in dealt:
        packet.verify(ATTEMPT, COHORT.context(), COHORT.sites)
    some = [name for name in NAMES if name != "S00"]
    assert [packet.holder for packet in COHORT.side(ME, some).deal()] == some


def test_shares_are_sealed_and_salted() -> None:
    """No two packets have a hash in common, and nothing of the secrets stands in them in clear."""
    again = SIDE.deal()
    hashes = [text for packet in [*PACKETS.values(), *again] for text in (packet.mask_hash, packet.seed_hash)]
    assert len(set(hashes)) == len(hashes)
    secrets = COHORT.secrets[ME]
    for packet in again:
        for secret in (secrets.cipher, secrets.mask, secrets.seed):
            assert secret.hex() not in packet.sealed


# -- masked input: U2


def check_sharers(sharers: Sequence[str], packets: Sequence[Packet], side: Side = SIDE) -> dict[str, Any]:
    return side.check_sharers(sharers, packets)


def test_honest_packets_open_down_to_the_threshold() -> None:
    opened = check_sharers(NAMES, FOR_ME)
    assert list(opened) == NAMES
    assert {kind: one.kind for kind, one in opened["S00"].items()} == {"mask": "mask", "seed": "seed"}
    some = [name for name in NAMES if name != "S00"]
    assert list(check_sharers(some, packets_to(PACKETS, ME, some))) == some


WITHOUT_ME = [name for name in NAMES if name != ME]
FEW = ["S01", ME, "S03"]
SETS = {
    "too few": (FEW, packets_to(PACKETS, ME, FEW)),
    "without this site": (WITHOUT_ME, packets_to(PACKETS, ME, WITHOUT_ME)),
    "nobody": ([], []),
    "one that is not in the roster": ([*NAMES, "S99"], FOR_ME),
    "a packet less": (NAMES, FOR_ME[1:]),
    "a packet more": (NAMES[1:], FOR_ME),
    "a packet twice": (NAMES, [*FOR_ME, FOR_ME[0]]),
    "one twice in place of another": (NAMES, [*FOR_ME[1:], FOR_ME[1]]),
    "no packets": (NAMES, []),
    "for another site": (NAMES, [PACKETS["S00", "S01"], *FOR_ME[1:]]),
    "this site's own to another": (NAMES, [*FOR_ME[:2], PACKETS[ME, "S00"], *FOR_ME[3:]]),
}


@pytest.mark.parametrize(("sharers", "packets"), SETS.values(), ids=SETS.keys())
def test_another_set_of_sharers_is_refused(sharers: list[str], packets: list[Packet]) -> None:
    with refused("secagg.sharers"):
        check_sharers(sharers, packets)


def test_a_sharer_that_did_not_advertise_is_refused() -> None:
    some = [name for name in NAMES if name != "S00"]
    side = COHORT.side(ME, some)
    dealt = deal(COHORT.sides(some))
    check_sharers(some, packets_to(dealt, ME, some), side)
    with refused("secagg.sharers"):
        check_sharers(NAMES, [FOR_ME[0], *packets_to(dealt, ME, some)], side)


def resealed(dealer: str, text: bytes, pair: tuple[str, str] | None = None, **changes: Any) -> Packet:
    """What a colluding dealer may make: anything, under its own signature."""
    told: dict[str, Any] = {"context": COHORT.context(), "attempt": ATTEMPT} | changes
    secrets, pair = COHORT.secrets[dealer], pair or (dealer, ME)
    sealed = keys.seal(secrets.cipher, OWN.cipher, told["attempt"], told["context"], pair, text)
    return replace(PACKETS[dealer, ME], sealed=sealed.hex()).signed(identity(dealer), ATTEMPT, COHORT.context())


PLAIN = keys.unseal(
    COHORT.secrets[ME].cipher,
    COHORT.adverts["S00"].cipher,
    ATTEMPT,
    COHORT.context(),
    ("S00", ME),
    bytes.fromhex(PACKETS["S00", ME].sealed),
)
PART = site.PART
BADLY_DEALT = {
    "noise": replace(PACKETS["S00", ME], sealed="00" * 158),
    "another's packet": replace(PACKETS["S00", ME], sealed=PACKETS["S01", ME].sealed),
    "sealed for another pair": resealed("S00", PLAIN, pair=("S01", ME)),
    "sealed in another context": resealed("S00", PLAIN, context=bytes(32)),
    "sealed in another attempt": resealed("S00", PLAIN, attempt=LATER),
    "too short": resealed("S00", PLAIN[:-1]),
    "one share": resealed("S00", PLAIN[:PART]),
    "three": resealed("S00", PLAIN + PLAIN[:PART]),
    "both the other way": resealed("S00", PLAIN[PART:] + PLAIN[:PART]),
    "another mask's share": resealed("S00", b"\1" + PLAIN[1:]),
    "another seed's share": resealed("S00", PLAIN[:PART] + b"\1" + PLAIN[PART + 1 :]),
    "another salt": resealed("S00", PLAIN[:-1] + bytes([PLAIN[-1] ^ 1])),
    "another hash": replace(PACKETS["S00", ME], mask_hash="0" * 64),
    "the hashes the other way": replace(
        PACKETS["S00", ME], mask_hash=PACKETS["S00", ME].seed_hash, seed_hash=PACKETS["S00", ME].mask_hash
    ),
}


def test_what_a_dealer_makes_as_it_should_passes() -> None:
    opened = check_sharers(NAMES, [resealed("S00", PLAIN), *FOR_ME[1:]])
    assert opened == check_sharers(NAMES, FOR_ME)


@pytest.mark.parametrize("packet", BADLY_DEALT.values(), ids=BADLY_DEALT.keys())
def test_a_share_that_does_not_open_names_its_dealer(packet: Packet) -> None:
    bad = packet.signed(identity("S00"), ATTEMPT, COHORT.context())
    with refused("secagg.shares") as caught:
        check_sharers(NAMES, [bad, *FOR_ME[1:]])
    assert isinstance(caught.value, WrongSharesError)
    assert caught.value.dealers == ["S00"]


def test_a_salt_of_another_length_names_its_dealer_though_its_hash_fits() -> None:
    """What cannot be opened to the coordinator later is of no use, whatever its dealer signed."""
    share, salt = PLAIN[PART : PART + 33], PLAIN[PART + 33 :] + b"more"
    hashed = messages.share_hash(ATTEMPT, COHORT.context(), ("S00", ME), "seed", share, salt)
    bad = replace(resealed("S00", PLAIN + b"more"), seed_hash=hashed).signed(identity("S00"), ATTEMPT, COHORT.context())
    with refused("secagg.shares") as caught:
        check_sharers(NAMES, [bad, *FOR_ME[1:]])
    assert caught.value.dealers == ["S00"]


def test_all_dealers_of_wrong_shares_are_named() -> None:
    bad = [
        replace(PACKETS[name, ME], sealed="00" * 158).signed(identity(name), ATTEMPT, COHORT.context())
        for name in ("S00", "S04")
    ]
    with refused("secagg.shares") as caught:
        check_sharers(NAMES, [bad[0], *FOR_ME[1:4], bad[1]])
    assert caught.value.dealers == ["S00", "S04"]


UNSIGNED = {
    "sealed changed": replace(PACKETS["S00", ME], sealed="00" * 158),
    "hash changed": replace(PACKETS["S00", ME], mask_hash="0" * 64),
    "no signature": replace(PACKETS["S00", ME], signature=""),
    "signed by another": PACKETS["S00", ME].signed(identity("S01"), ATTEMPT, COHORT.context()),
    "of another attempt": PACKETS["S00", ME].signed(identity("S00"), LATER, COHORT.context()),
    "of another context": PACKETS["S00", ME].signed(identity("S00"), ATTEMPT, bytes(32)),
    "redirected": replace(PACKETS["S00", "S01"], holder=ME),
    "another dealer's name": replace(PACKETS["S01", ME], dealer="S00"),
}


@pytest.mark.parametrize("packet", UNSIGNED.values(), ids=UNSIGNED.keys())
def test_what_a_dealer_did_not_sign_is_not_blamed_on_it(packet: Packet) -> None:
    """A coordinator that changes a packet would have an honest dealer left out."""
    with refused("secagg.signature") as caught:
        check_sharers(NAMES, [packet, *FOR_ME[1:]])
    assert not isinstance(caught.value, WrongSharesError)


def test_packets_of_sites_that_were_told_something_else_are_refused() -> None:
    told = COHORT.context(weights="1" * 64)
    other = deal({"S00": COHORT.side("S00", context=told)})
    with refused("secagg.signature"):
        check_sharers(NAMES, [other["S00", ME], *FOR_ME[1:]])


# -- masks


def test_masks_are_one_own_and_one_a_pair_that_cancels() -> None:
    masks = {name: SIDES[name].masks(NAMES) for name in NAMES}
    for number, name in enumerate(NAMES):
        assert [sign for sign, _ in masks[name]] == [1] + [-1] * number + [1] * (4 - number)
    count: dict[bytes, list[int]] = {}
    for mine in masks.values():
        for sign, seed in mine:
            count.setdefault(seed, []).append(sign)
    assert sorted(map(sorted, count.values())) == [[-1, 1]] * 10 + [[1]] * 5  # type: ignore[comparison-overlap]


def test_masks_do_not_depend_on_the_order_of_the_sharers() -> None:
    assert SIDE.masks(NAMES) == SIDE.masks(list(reversed(NAMES)))


def test_no_mask_serves_in_another_set_context_or_attempt() -> None:
    some = [name for name in NAMES if name != "S04"]
    told = [
        SIDE.masks(NAMES),
        SIDE.masks(some),
        COHORT.side(ME, context=bytes(32)).masks(NAMES),
        replace(SIDE, attempt=LATER).masks(NAMES),
        replace(SIDE, secrets=Secrets.fresh()).masks(NAMES),
    ]
    seeds = [seed for masks in told for _, seed in masks]
    assert len(set(seeds)) == len(seeds) == 5 + 4 + 5 + 5 + 5


# -- findings

# Of n = 5, c = 1: a finding needs three that label it.
LABELLED = Cohort(
    n=5,
    findings={
        "S00": ["all", "four", "three", "two", "one"],
        "S01": ["all", "four", "three", "two"],
        "S02": ["all", "four", "three"],
        "S03": ["all", "four"],
        "S04": ["all"],
    },
)
FINDINGS = ["one", "two", "three", "four", "all", "none"]


def test_findings_that_too_few_sharers_label_are_left_out() -> None:
    side = LABELLED.side(ME)
    assert side.zeroed(FINDINGS, NAMES) == ["one", "two", "none"]
    assert side.zeroed(FINDINGS, NAMES[1:]) == ["one", "two", "three", "none"]
    assert side.zeroed([], NAMES) == []


@pytest.mark.parametrize(("colluders", "least"), [(0, 3), (1, 3), (2, 4), (3, 5)])
def test_more_colluders_need_more_that_label(colluders: int, least: int) -> None:
    cohort = Cohort(n=5, colluders=colluders, findings=LABELLED.findings)
    counted = {"one": 1, "two": 2, "three": 3, "four": 4, "all": 5, "none": 0}
    assert cohort.side(ME).zeroed(FINDINGS, NAMES) == [name for name in FINDINGS if counted[name] < least]


def test_all_sites_leave_out_the_same_whatever_minimum_each_has() -> None:
    """The largest of the sharers' minimums counts for all: else one zeroes what another sends, and is known by it."""
    cohort = Cohort(n=5, findings=LABELLED.findings, minimums={"S04": 5, "S01": 4})
    for name, side in cohort.sides().items():
        assert side.zeroed(FINDINGS, NAMES) == ["one", "two", "three", "four", "none"], name
    some = NAMES[:4]
    for name in some:  # the site with the largest is not among the sharers
        assert cohort.side(name).zeroed(FINDINGS, some) == ["one", "two", "three", "none"]


def test_all_sites_leave_out_the_same() -> None:
    for sharers in (NAMES, NAMES[:4], NAMES[1:]):
        assert len({tuple(LABELLED.side(name).zeroed(FINDINGS, sharers)) for name in sharers}) == 1


# -- consistency: U3


def test_a_site_agrees_to_survivors_down_to_the_threshold() -> None:
    fields = messages.survivors_fields(ATTEMPT, COHORT.context(), NAMES, NAMES)
    messages.verify(COHORT.sites, ME, SIDE.sign_survivors(NAMES, NAMES, []), signing.SURVIVORS, fields)
    some = [name for name in NAMES if name != "S00"]
    fields = messages.survivors_fields(ATTEMPT, COHORT.context(), NAMES, some)
    messages.verify(COHORT.sites, ME, SIDE.sign_survivors(NAMES, some, []), signing.SURVIVORS, fields)


SURVIVORS = {
    "too few": (NAMES, FEW),
    "without this site": (NAMES, WITHOUT_ME),
    "one that did not share": (NAMES[:4], NAMES),
    "one in place of another": (NAMES[:4], [*NAMES[:3], "S04"]),
    "a stranger": (NAMES, [*NAMES, "S99"]),
    "nobody": (NAMES, []),
}


@pytest.mark.parametrize(("sharers", "survivors"), SURVIVORS.values(), ids=SURVIVORS.keys())
def test_another_set_of_survivors_is_refused(sharers: list[str], survivors: list[str]) -> None:
    with refused("secagg.survivors"):
        SIDE.sign_survivors(sharers, survivors, [])


def test_a_site_s_own_minimum_counts_where_it_is_larger() -> None:
    cohort = Cohort(n=5, minimums={"S04": 5})
    four = NAMES[1:]
    cohort.side("S01").sign_survivors(NAMES, four, [])
    with refused("secagg.survivors"):
        cohort.side("S04").sign_survivors(NAMES, four, [])
    cohort.side("S04").sign_survivors(NAMES, NAMES, [])


def test_with_three_sites_none_may_be_lost() -> None:
    cohort = Cohort(n=3)  # t = 2
    side = cohort.side("S00")
    side.sign_survivors(cohort.names, cohort.names, [])
    with refused("secagg.survivors"):
        side.sign_survivors(cohort.names, ["S00", "S01"], [])


def test_a_finding_that_too_few_survivors_label_is_refused() -> None:
    side, summed = LABELLED.side(ME), ["three", "four", "all"]
    side.sign_survivors(NAMES, NAMES, summed)
    side.sign_survivors(NAMES, [name for name in NAMES if name != "S04"], summed)
    with refused("secagg.findings") as caught:
        side.sign_survivors(NAMES, [name for name in NAMES if name != "S00"], summed)
    assert "three" in str(caught.value)
    side.sign_survivors(NAMES, [name for name in NAMES if name != "S00"], ["four", "all"])  # it was zeroed


def test_the_largest_minimum_of_the_sharers_counts_for_the_survivors_findings() -> None:
    """Of a sharer that is lost too: by its wish the finding was summed or not."""
    cohort = Cohort(n=5, findings=dict.fromkeys(NAMES, ["all"]) | {"S03": [], "S04": ["all"]}, minimums={"S04": 4})
    side = cohort.side(ME)
    assert side.zeroed(["all"], NAMES) == []
    side.sign_survivors(NAMES, NAMES, ["all"])
    with refused("secagg.findings"):
        side.sign_survivors(NAMES, NAMES[:4], ["all"])


# -- unmask


def signatures(
    signers: Sequence[str], sharers: Sequence[str] = NAMES, survivors: Sequence[str] = NAMES
) -> dict[str, str]:
    fields = messages.survivors_fields(ATTEMPT, COHORT.context(), sharers, survivors)
    return {name: signing.sign(identity(name), signing.SURVIVORS, fields).hex() for name in signers}


def test_a_threshold_of_signers_is_enough() -> None:
    SIDE.check_signers(NAMES, NAMES, signatures(NAMES))
    for name in NAMES:
        SIDE.check_signers(NAMES, NAMES, signatures([other for other in NAMES if other != name]))


def test_too_few_signers_are_refused() -> None:
    for few in ([], NAMES[:3], FEW):
        with refused("secagg.signers"):
            SIDE.check_signers(NAMES, NAMES, signatures(few))


def test_a_signer_that_did_not_survive_is_refused() -> None:
    four = [name for name in NAMES if name != "S00"]
    SIDE.check_signers(NAMES, four, signatures(four, survivors=four))
    with refused("secagg.signers"):
        SIDE.check_signers(NAMES, four, signatures(["S00", *four[1:]], survivors=four))
    with refused("secagg.signers"):
        SIDE.check_signers(NAMES, four, signatures([*four, "S00"], survivors=four))
    with refused("secagg.signers"):
        SIDE.check_signers(NAMES, four, signatures(four[:3], survivors=four) | signatures(["S99"], survivors=four))


@pytest.mark.parametrize("other", ["survivors", "sharers", "context", "attempt", "purpose", "signer", "nothing"])
def test_one_signature_of_another_set_spoils_all(other: str) -> None:
    """Four of five would be enough; what does not fit is not passed over."""
    told: dict[str, Any] = {"attempt": ATTEMPT, "context": COHORT.context(), "sharers": NAMES, "survivors": NAMES}
    told |= {"attempt": {"attempt": LATER}, "context": {"context": bytes(32)}}.get(other, {})
    told |= {other: NAMES[1:]} if other in ("survivors", "sharers") else {}
    purpose = signing.MASKED if other == "purpose" else signing.SURVIVORS
    key = identity("S01" if other == "signer" else "S00")
    word = signing.sign(key, purpose, messages.survivors_fields(**told)).hex()
    given = signatures(NAMES[1:]) | {"S00": word}
    if other == "nothing":
        SIDE.check_signers(NAMES, NAMES, given)
        return
    with refused("secagg.signature"):
        SIDE.check_signers(NAMES, NAMES, given)


def test_one_kind_of_share_of_each_sharer() -> None:
    shares = check_sharers(NAMES, FOR_ME)
    for survivors in (NAMES, NAMES[1:], NAMES[:4]):
        given = Side.answer(shares, survivors)
        assert list(given) == NAMES
        for dealer, one in given.items():
            assert one.kind == ("seed" if dealer in survivors else "mask")
            assert one == shares[dealer][one.kind]
