"""Keys of an attempt: two ends agree, nobody else does, and nothing serves in another place than its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import RefusedError
from chexfound.secagg import keys
from chexfound.secagg.keys import Secrets, agree, own_seed, pair_seed, public, seal, unseal
from tests.secagg.cohort import ATTEMPT

A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))
CONTEXT, OTHER = b"c" * 32, b"d" * 32
SHARERS = ["A", "B", "C"]
OTHER_ATTEMPTS = [
    replace(ATTEMPT, run=8),
    replace(ATTEMPT, phase="pretrain"),
    replace(ATTEMPT, round=3),
    replace(ATTEMPT, attempt=2),
]

# Points of small order, as any private key agrees with on zero: 0, 1, p - 1, p and p + 1 by themselves, and the two of
# order 8 (https://cr.yp.to/ecdh.html#validate); little-endian hex.
P = 2**255 - 19
ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
SMALL = [value.to_bytes(32, "little").hex() for value in (0, 1, P - 1, P, P + 1, *ORDER_8)]


def seed_of(private: bytes, peer: bytes, **other: Any) -> bytes:
    told: dict[str, Any] = {"attempt": ATTEMPT, "context": CONTEXT, "sharers": SHARERS, "pair": ("A", "B")}
    return pair_seed(private, public(peer), **(told | other))


def test_both_ends_of_a_pair_have_one_seed_and_no_third_has_it() -> None:
    assert seed_of(A, B) == seed_of(B, A)
    assert len(seed_of(A, B)) == 32
    assert seed_of(C, A) != seed_of(A, B) != seed_of(C, B)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
@settings(max_examples=25)
def test_any_two_keys_agree(one: bytes, other: bytes) -> None:
    assert seed_of(one, other) == seed_of(other, one)


CHANGES = [
    *({"attempt": other} for other in OTHER_ATTEMPTS),
    {"context": OTHER},
    {"sharers": ["A", "B"]},
    {"sharers": ["A", "B", "D"]},
    {"pair": ("A", "C")},
    {"pair": ("B", "A")},
    {"pair": ("AB", "")},
]


def test_a_pair_s_seed_changes_with_all_that_it_binds() -> None:
    seeds = [seed_of(A, B), *(seed_of(A, B, **change) for change in CHANGES)]
    assert len(set(seeds)) == len(seeds)


def test_an_own_seed_changes_with_all_that_it_binds() -> None:
    told: dict[str, Any] = {"attempt": ATTEMPT, "context": CONTEXT, "sharers": SHARERS, "site": "A"}
    changes = [
        *({"attempt": other} for other in OTHER_ATTEMPTS),
        {"context": OTHER},
        {"sharers": ["A", "B"]},
        {"site": "B"},
    ]
    seeds = [own_seed(C, **told), own_seed(B, **told), *(own_seed(C, **(told | change)) for change in changes)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == own_seed(C, **told)


def test_one_secret_for_two_purposes_gives_two_keys() -> None:
    assert agree(A, public(B), "one", []) != agree(A, public(B), "other", [])
    assert agree(A, public(B), "one", [b"ab"]) != agree(A, public(B), "one", [b"a", b"b"])


@pytest.mark.parametrize("peer", SMALL)
def test_a_key_of_small_order_is_refused(peer: str) -> None:
    with pytest.raises(RefusedError, match="small order") as caught:
        agree(A, peer, "any", [])
    assert caught.value.code == "secagg.cohort"
    with pytest.raises(RefusedError):
        seal(A, peer, ATTEMPT, CONTEXT, ("A", "B"), b"text")


def test_another_s_key_under_other_bytes_gives_no_seed_of_its_pairs() -> None:
    """X25519 does not read the top bit, so one key has two texts: only the names keep a copy from the pair's seed."""
    key = bytes.fromhex(public(A))
    copy = (key[:31] + bytes([key[31] ^ 0x80])).hex()
    assert copy != public(A)
    assert agree(B, copy, "any", []) == agree(B, public(A), "any", [])
    for pair in (("B", "C"), ("C", "B")):
        assert pair_seed(B, copy, ATTEMPT, CONTEXT, SHARERS, pair) != seed_of(B, A)


def test_fresh_secrets_are_new_and_are_not_shown() -> None:
    one, other = Secrets.fresh(), Secrets.fresh()
    values = [getattr(secrets, name) for secrets in (one, other) for name in ("cipher", "mask", "seed")]
    assert len(set(values)) == 6
    assert {len(value) for value in values} == {32}
    for value in values[:3]:
        assert repr(value) not in repr(one)
        assert value.hex() not in repr(one)


# -- sealing


@given(st.binary(max_size=200))
@settings(max_examples=25)
def test_what_is_sealed_is_opened_by_its_holder(text: bytes) -> None:
    sealed = seal(A, public(B), ATTEMPT, CONTEXT, ("A", "B"), text)
    assert len(sealed) == 12 + len(text) + 16
    assert unseal(B, public(A), ATTEMPT, CONTEXT, ("A", "B"), sealed) == text


def test_a_site_seals_for_itself() -> None:
    sealed = seal(A, public(A), ATTEMPT, CONTEXT, ("A", "A"), b"text")
    assert unseal(A, public(A), ATTEMPT, CONTEXT, ("A", "A"), sealed) == b"text"


def test_no_nonce_serves_twice() -> None:
    nonces = {seal(A, public(B), ATTEMPT, CONTEXT, ("A", "B"), b"")[: keys.NONCE_BYTES] for _ in range(50)}
    assert len(nonces) == 50


SEALED = seal(A, public(B), ATTEMPT, CONTEXT, ("A", "B"), b"a share and its salt")


def test_no_bit_can_be_turned() -> None:
    for bit in range(8 * len(SEALED)):
        turned = bytearray(SEALED)
        turned[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError) as caught:
            unseal(B, public(A), ATTEMPT, CONTEXT, ("A", "B"), bytes(turned))
        assert caught.value.code == "secagg.shares"


@pytest.mark.parametrize("size", [0, 1, 11, 12, 13, 27, 28, len(SEALED) - 1])
def test_what_is_cut_does_not_open(size: int) -> None:
    with pytest.raises(RefusedError, match="the shares of 'A' do not open"):
        unseal(B, public(A), ATTEMPT, CONTEXT, ("A", "B"), SEALED[:size])


ELSEWHERE: list[dict[str, Any]] = [
    *({"attempt": other} for other in OTHER_ATTEMPTS),
    {"context": OTHER},
    *({"packet": pair} for pair in itertools.product("ABC", "ABC") if pair != ("A", "B")),
    {"private": C},
    {"peer": public(C)},
]


@pytest.mark.parametrize("other", ELSEWHERE, ids=str)
def test_it_opens_nowhere_else(other: dict[str, Any]) -> None:
    told: dict[str, Any] = {
        "private": B,
        "peer": public(A),
        "attempt": ATTEMPT,
        "context": CONTEXT,
        "packet": ("A", "B"),
        "sealed": SEALED,
    }
    assert unseal(**told) == b"a share and its salt"
    with pytest.raises(RefusedError) as caught:
        unseal(**(told | other))
    assert caught.value.code == "secagg.shares"
