"""What comes from outside is a value of known length or a ProtocolError; what is signed cannot be changed."""

from __future__ import annotations

import itertools
import string
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ProtocolError, RefusedError
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.secagg import messages
from chexfound.secagg.messages import Advert, Attempt, Opened, Packet, parse, parse_all, parse_names
from chexfound.secagg.parameters import Parameters
from tests.secagg.cohort import ATTEMPT, Cohort, deal, identity, roster

COHORT = Cohort(n=3, findings={"S00": ["Edema", "Nodule"]})
ADVERT = COHORT.adverts["S00"]
CONTEXT = COHORT.context()
PACKET = deal({"S00": COHORT.side("S00")})["S00", "S01"]
OPENED = Opened(kind="mask", share="0" * 66, salt="0" * 64)
OTHER_ATTEMPTS = [
    replace(ATTEMPT, run=8),
    replace(ATTEMPT, phase="pretrain"),
    replace(ATTEMPT, round=3),
    replace(ATTEMPT, attempt=2),
]
KINDS = [Attempt, Advert, Packet, Opened]
VALUES: dict[Any, Any] = {Attempt: ATTEMPT, Advert: ADVERT, Packet: PACKET, Opened: OPENED}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=70)
    | st.text("0123456789abcdef", max_size=140)
    | st.text(st.characters(codec=None), max_size=3),  # lone surrogates among them
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


# -- what comes from outside


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_value_comes_back(kind: Any) -> None:
    assert parse(kind, asdict(VALUES[kind]), "a value") == VALUES[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(value=json_values)
def test_anything_else_is_an_error_of_ours(kind: Any, value: Any) -> None:
    with pytest.raises(ProtocolError, match="a value: malformed"):
        parse(kind, value, "a value")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_changed_field_is_refused_or_of_its_type(kind: Any, data: st.DataObject) -> None:
    """As a whole value of the right fields, one of which is hostile."""
    name = data.draw(st.sampled_from([one.name for one in fields(kind)]))
    value = data.draw(json_values)
    try:
        made = parse(kind, asdict(VALUES[kind]) | {name: value}, "a value")
    except ProtocolError:
        return
    kept = getattr(made, name)
    assert kept == value  # and not what it could be made into
    assert type(kept) is type(value)
    if isinstance(kept, int):
        assert 0 <= kept < 2**64
    elif isinstance(kept, str):
        assert len(kept) <= 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_more_or_less_is_refused(kind: Any) -> None:
    values = asdict(VALUES[kind])
    with pytest.raises(ProtocolError):
        parse(kind, values | {"more": 1}, "a value")
    needed = [name for name in values if name not in ("signature", "state")]
    for name in needed:
        with pytest.raises(ProtocolError):
            parse(kind, {key: value for key, value in values.items() if key != name}, "a value")


HEX64, LONG = "0" * 64, "f" * 65
WRONG = [
    *((Attempt, name, wrong) for name in ("run", "round", "attempt") for wrong in (-1, 2**64, True, 1.0, "1", None)),
    *((Attempt, "phase", wrong) for wrong in ("", "p" * 65, 1, b"p".hex)),
    *((Advert, "site", wrong) for wrong in ("", "s" * 65, "\ud800")),
    *(
        (Advert, name, wrong)
        for name in ("cipher", "mask", "commitment")
        for wrong in ("", "0" * 63, LONG, "g" * 64, "A" * 64, HEX64 + "\n", "\n" + HEX64, HEX64[:-1] + "٠")
    ),
    *((Advert, "minimum", wrong) for wrong in (-1, 129, 3.0, "3", True)),
    *((Advert, "findings", wrong) for wrong in ("Edema", ["f" * 201], [1], [["f"]], ["f"] * 4097, None)),
    *((Advert, "state", wrong) for wrong in ("0", LONG, None)),
    *((Advert, "signature", wrong) for wrong in ("0" * 127, "0" * 129, "0" * 128 + "\n")),
    *((Packet, "sealed", wrong) for wrong in ("", "0", "00" * 513, "zz", "000")),
    *((Packet, name, wrong) for name in ("mask_hash", "seed_hash") for wrong in ("", LONG, "Z" * 64)),
    *((Packet, name, wrong) for name in ("dealer", "holder") for wrong in ("", "s" * 65, None)),
    *((Opened, "kind", wrong) for wrong in ("", "masks", "MASK", None, 1)),
    *((Opened, "share", wrong) for wrong in ("", "0" * 64, "0" * 68, "0" * 65 + "G")),
    *((Opened, "salt", wrong) for wrong in ("", "0" * 62, LONG)),
]


@pytest.mark.parametrize(("kind", "name", "wrong"), WRONG, ids=lambda part: repr(part)[:30])
def test_bounds(kind: Any, name: str, wrong: Any) -> None:
    with pytest.raises(ProtocolError, match="the field: malformed"):
        parse(kind, asdict(VALUES[kind]) | {name: wrong}, "the field")


def test_the_largest_are_taken() -> None:
    largest = {"findings": ["f" * 200] * 4096, "minimum": 128, "site": "s" * 64}
    assert parse(Advert, asdict(ADVERT) | largest, "an advert").minimum == 128
    assert parse(Packet, asdict(PACKET) | {"sealed": "00" * 512}, "a packet").sealed == "00" * 512
    assert parse(Attempt, asdict(ATTEMPT) | {"run": 2**64 - 1}, "an attempt").run == 2**64 - 1


def test_what_is_too_deep_is_an_error_of_ours() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ProtocolError, match="malformed"):
        parse(Advert, deep, "an advert")
    with pytest.raises(ProtocolError, match="malformed"):
        parse(Advert, asdict(ADVERT) | {"findings": deep}, "an advert")
    while deep:  # or the interpreter's own stack ends when it is dropped
        deep = deep.pop()


@given(st.one_of(json_values, st.lists(st.text(max_size=3), max_size=4)))
def test_names_are_in_order_each_once_or_an_error_of_ours(value: Any) -> None:
    try:
        names = parse_names(value, "the names")
    except ProtocolError:
        return
    assert names == value
    assert all(one < other for one, other in itertools.pairwise(names))


@pytest.mark.parametrize("wrong", [["b", "a"], ["a", "a"], "ab", {"a": 1}, [1], [None], None, ["a"] * 2])
def test_what_is_no_set_of_names(wrong: Any) -> None:
    with pytest.raises(ProtocolError, match="the names"):
        parse_names(wrong, "the names")


def test_a_list_has_an_end() -> None:
    names = [f"{number:03d}" for number in range(129)]
    assert parse_names(names[:128], "the names") == names[:128]
    with pytest.raises(ProtocolError, match="not a list of 128 or fewer"):
        parse_names(names, "the names")
    assert parse_all(Opened, [asdict(OPENED)] * 3, "shares", most=3) == [OPENED] * 3
    with pytest.raises(ProtocolError, match="not a list of 3 or fewer"):
        parse_all(Opened, [asdict(OPENED)] * 4, "shares", most=3)


# -- what is signed

CHANGED_ADVERT: dict[str, Any] = {
    "site": "S01",
    "cipher": ADVERT.mask,
    "mask": ADVERT.cipher,
    "commitment": "1" * 64,
    "findings": ["Edema"],
    "minimum": 4,
    "state": "1" * 64,
    "signature": COHORT.adverts["S01"].signature,
}


def test_an_honest_advert_is_believed() -> None:
    for advert in COHORT.adverts.values():
        advert.verify(ATTEMPT, COHORT.sites)


@pytest.mark.parametrize("name", [one.name for one in fields(Advert)])
def test_no_field_of_an_advert_can_be_changed(name: str) -> None:
    changed = replace(ADVERT, **{name: CHANGED_ADVERT[name]})
    with pytest.raises(RefusedError) as caught:
        changed.verify(ATTEMPT, COHORT.sites)
    assert caught.value.code == "secagg.signature"


@pytest.mark.parametrize("attempt", OTHER_ATTEMPTS)
def test_an_advert_is_of_its_attempt(attempt: Attempt) -> None:
    with pytest.raises(RefusedError) as caught:
        ADVERT.verify(attempt, COHORT.sites)
    assert caught.value.code == "secagg.signature"


def test_an_advert_without_a_signature_or_of_a_stranger_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        replace(ADVERT, signature="").verify(ATTEMPT, COHORT.sites)
    assert caught.value.code == "secagg.signature"
    stranger = replace(ADVERT, site="S99").signed(identity("S99"), ATTEMPT)
    with pytest.raises(RefusedError, match="'S99' is not in the roster") as caught:
        stranger.verify(ATTEMPT, COHORT.sites)
    assert caught.value.code == "secagg.cohort"


CHANGED_PACKET: dict[str, Any] = {
    "dealer": "S01",
    "holder": "S02",
    "sealed": PACKET.sealed[:-2] + ("00" if PACKET.sealed[-2:] != "00" else "01"),
    "mask_hash": PACKET.seed_hash,
    "seed_hash": PACKET.mask_hash,
    "signature": ADVERT.signature,
}


@pytest.mark.parametrize("name", [one.name for one in fields(Packet)])
def test_no_field_of_a_packet_can_be_changed(name: str) -> None:
    PACKET.verify(ATTEMPT, CONTEXT, COHORT.sites)
    with pytest.raises(RefusedError) as caught:
        replace(PACKET, **{name: CHANGED_PACKET[name]}).verify(ATTEMPT, CONTEXT, COHORT.sites)
    assert caught.value.code == "secagg.signature"


def test_a_packet_is_of_its_attempt_and_context() -> None:
    for attempt in OTHER_ATTEMPTS:
        with pytest.raises(RefusedError):
            PACKET.verify(attempt, CONTEXT, COHORT.sites)
    with pytest.raises(RefusedError):
        PACKET.verify(ATTEMPT, bytes(32), COHORT.sites)


def test_a_signature_for_one_purpose_is_none_for_another() -> None:
    purposes = [signing.ADVERT, signing.PACKET, signing.MASKED, signing.SURVIVORS, signing.REPLY, signing.ROSTER]
    assert len(set(purposes)) == len(purposes)
    told = [b"a", b"b"]
    signature = signing.sign(identity("S00"), signing.MASKED, told).hex()
    messages.verify(COHORT.sites, "S00", signature, signing.MASKED, told)
    for purpose in purposes:
        if purpose != signing.MASKED:
            with pytest.raises(RefusedError):
                messages.verify(COHORT.sites, "S00", signature, purpose, told)


def test_what_is_signed_of_masked_arrays_and_of_survivors_tells_all_apart() -> None:
    told = [
        *(messages.masked_fields(attempt, CONTEXT, "S00", ["S00"], "0") for attempt in (ATTEMPT, *OTHER_ATTEMPTS)),
        messages.masked_fields(ATTEMPT, bytes(32), "S00", ["S00"], "0"),
        messages.masked_fields(ATTEMPT, CONTEXT, "S01", ["S00"], "0"),
        messages.masked_fields(ATTEMPT, CONTEXT, "S00", ["S00", "S01"], "0"),
        messages.masked_fields(ATTEMPT, CONTEXT, "S00", ["S00"], "1"),
        *(messages.survivors_fields(attempt, CONTEXT, ["S00"], ["S00"]) for attempt in (ATTEMPT, *OTHER_ATTEMPTS)),
        messages.survivors_fields(ATTEMPT, bytes(32), ["S00"], ["S00"]),
        messages.survivors_fields(ATTEMPT, CONTEXT, ["S00", "S01"], ["S00"]),
        messages.survivors_fields(ATTEMPT, CONTEXT, ["S00"], ["S00", "S01"]),
        messages.survivors_fields(ATTEMPT, CONTEXT, ["S00"], ["S01"]),
    ]
    assert len({tuple(one) for one in told}) == len(told)


names_of_sites = st.lists(st.text(string.printable, max_size=4), max_size=4, unique=True)


@given(names_of_sites, names_of_sites)
def test_a_set_s_digest_is_of_the_set(one: list[str], other: list[str]) -> None:
    assert (messages.names_digest(one) == messages.names_digest(other)) == (set(one) == set(other))


# -- hashes of shares, and commitments


def test_a_share_s_hash_binds_all_that_it_is_of() -> None:
    share, salt = bytes(33), bytes(32)
    told: dict[str, Any] = {
        "attempt": ATTEMPT,
        "context": CONTEXT,
        "packet": ("S00", "S01"),
        "kind": "mask",
        "share": share,
        "salt": salt,
    }
    changes: list[dict[str, Any]] = [
        {},
        *({"attempt": attempt} for attempt in OTHER_ATTEMPTS),
        {"context": bytes(32)},
        {"packet": ("S01", "S00")},
        {"packet": ("S00", "S02")},
        {"packet": ("S02", "S01")},
        {"packet": ("S00S", "01")},
        {"kind": "seed"},
        {"share": share[:-1] + b"\1"},
        {"salt": salt[:-1] + b"\1"},
        {"share": share[:-1], "salt": salt + b"\0"},
    ]
    hashes = [messages.share_hash(**(told | change)) for change in changes]
    assert len(set(hashes)) == len(hashes)


def test_a_commitment_binds_attempt_site_and_seed() -> None:
    commitments = [
        messages.seed_commitment(ATTEMPT, "S00", bytes(32)),
        *(messages.seed_commitment(attempt, "S00", bytes(32)) for attempt in OTHER_ATTEMPTS),
        messages.seed_commitment(ATTEMPT, "S01", bytes(32)),
        messages.seed_commitment(ATTEMPT, "S00", bytes(31) + b"\1"),
    ]
    assert len(set(commitments)) == len(commitments)


# -- the context

TOLD: dict[str, Any] = {
    "attempt": ATTEMPT,
    "sites": COHORT.sites,
    "parameters": COHORT.parameters,
    "adverts": COHORT.adverts,
    "request": {"phase": "adapt", "round": 2, "step": 80, "steps": 40, "batch_size": 8, "findings": ["Edema"]},
    "weights": "0" * 64,
    "recipe": "{}",
    "layout": [{"name": "tensor/w", "shape": [2], "ring": 32, "range": 1.0}],
}


def context(**changes: Any) -> bytes:
    return messages.context_of(**(TOLD | changes))


def advert_with(**changes: Any) -> dict[str, Advert]:
    return {**COHORT.adverts, "S02": replace(COHORT.adverts["S02"], **changes)}


def layout_with(**changes: Any) -> list[dict[str, Any]]:
    return [TOLD["layout"][0] | changes]


CHANGES: list[dict[str, Any]] = [
    *({"attempt": attempt} for attempt in OTHER_ATTEMPTS),
    {"sites": roster(COHORT.names, federation="heart")},
    {"sites": roster([*COHORT.names, "S03"])},
    {"sites": Roster(federation="thorax", serial=1, sites={**COHORT.sites.sites, "S02": COHORT.sites.sites["S01"]})},
    {"parameters": Parameters(n=4, c=0, t=3)},
    {"parameters": Parameters(n=3, c=1, t=3)},
    {"parameters": Parameters(n=3, c=0, t=3)},
    {"adverts": {name: COHORT.adverts[name] for name in ("S00", "S01")}},
    *(
        {"adverts": advert_with(**{name: CHANGED_ADVERT[name]})}
        for name in ("cipher", "mask", "commitment", "findings", "minimum", "state", "signature")
    ),
    *({"request": TOLD["request"] | {name: 9}} for name in ("phase", "round", "step", "steps", "batch_size")),
    {"request": TOLD["request"] | {"findings": ["Edema", "Nodule"]}},
    {"weights": "0" * 63 + "1"},
    {"recipe": '{"seed": 1}'},
    {"layout": layout_with(name="tensor/v")},
    {"layout": layout_with(shape=[3])},
    {"layout": layout_with(ring=16)},
    {"layout": layout_with(range=1.0000000000000002)},
    {"layout": TOLD["layout"] * 2},
    {"layout": []},
]


def test_the_context_changes_with_every_input() -> None:
    contexts = [context(), *(context(**change) for change in CHANGES)]
    assert len(set(contexts)) == len(contexts)
    assert {len(one) for one in contexts} == {32}


def test_the_context_is_the_same_at_all_sites() -> None:
    """Whatever the order in which they have it, and whatever minimum each has itself."""
    turned = dict(reversed(COHORT.adverts.items()))
    sites = Roster(federation="thorax", serial=1, sites=dict(reversed(COHORT.sites.sites.items())))
    own = replace(COHORT.parameters, minimum=3)
    request = dict(reversed(TOLD["request"].items()))
    assert context(adverts=turned, sites=sites, parameters=own, request=request) == context()


def test_digests_of_weights() -> None:
    pairs = [("a", "b"), ("b", "a"), ("ab", ""), ("", "ab")]
    assert len({messages.weights_of(*pair) for pair in pairs}) == len(pairs)
