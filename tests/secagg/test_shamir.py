from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import ConfigError, ProtocolError
from chexfound.secagg import shamir
from chexfound.secagg.shamir import PRIME, join, lagrange, split

# The prime factors of p − 1, for 2**256 + 297 and for each of its factors that is not small (found with PARI/GP).
FACTORS = {
    PRIME: [2, 3, 13, 67, 9729922537253, 1200461269659761894123, 474233203066845416735444346211990045207],
    9729922537253: [2, 93887, 25908599],
    1200461269659761894123: [2, 13, 37, 167, 7472339746659043],
    7472339746659043: [2, 3, 1489, 423287, 1975949],
    474233203066845416735444346211990045207: [2, 3, 251, 106508275638671, 2956539135407950972181],
    106508275638671: [2, 5, 53, 94483, 2126933],
    2956539135407950972181: [2, 5, 7, 3016876668783623441],
    3016876668783623441: [2, 5, 23, 1151, 1877, 2333, 325301],
}

secret_bytes = st.binary(min_size=32, max_size=32)


def is_prime(number: int) -> bool:
    """A proof either way: by trial division, or by an element of order p − 1 (Lucas; Pratt 1975)."""
    if number < 2**26:
        return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
    rest = number - 1
    for factor in FACTORS[number]:
        assert is_prime(factor)
        while rest % factor == 0:
            rest //= factor
    assert rest == 1, "not all factors"
    return any(
        pow(base, number - 1, number) == 1
        and all(pow(base, (number - 1) // factor, number) != 1 for factor in FACTORS[number])
        for base in range(2, 200)
    )


def test_the_field_is_that_of_the_smallest_prime_above_all_secrets():
    assert is_prime(PRIME)
    # What fails Fermat's test is composite.  Not to base 2: 2**256 + 1, a Fermat number, passes that.
    for number in range(2**256 + 1, PRIME, 2):
        assert pow(3, number - 1, number) != 1


@given(secret_bytes, st.data())
@settings(deadline=None)
def test_any_threshold_of_shares_rebuilds_the_secret(secret, data):
    points = data.draw(st.lists(st.integers(1, 255), min_size=2, max_size=12, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    shares = split(secret, points, threshold)
    assert list(shares) == points
    assert {len(share) for share in shares.values()} == {33}
    some = data.draw(st.lists(st.sampled_from(points), min_size=threshold, unique=True))
    assert join({point: shares[point] for point in some}, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_every_subset_of_a_small_cohort_rebuilds_the_extremes(secret):
    shares = split(secret, [1, 2, 100, 254, 255], 3)
    for size in (3, 4, 5):
        for some in itertools.combinations(shares, size):
            assert join({point: shares[point] for point in some}, 3) == secret


def test_a_whole_cohort():
    secrets = [os.urandom(32) for _ in range(8)]
    dealt = [split(secret, range(1, 129), 85) for secret in secrets]
    holders = range(20, 105)
    rebuilt = [join({point: shares[point] for point in holders}, 85) for shares in dealt]
    assert rebuilt == secrets


@given(secret_bytes, secret_bytes, st.integers(2, 6))
@settings(deadline=None, max_examples=30)
def test_fewer_shares_fit_every_secret(secret, other, threshold):
    """For any other secret there is a polynomial of the same degree through the same t − 1 shares: a share more, which
    those holders lack, decides between them."""
    shares = split(secret, range(1, threshold + 1), threshold)
    few = {point: shares[point] for point in range(1, threshold)}
    coefficients = lagrange((*few, threshold))
    known = sum(one * int.from_bytes(few[point], "big") for one, point in zip(coefficients, few, strict=False))
    last = (int.from_bytes(other, "big") - known) * pow(coefficients[-1], -1, PRIME) % PRIME
    assert join({**few, threshold: last.to_bytes(33, "big")}, threshold) == other


def test_each_share_is_uniform_whatever_the_secret(monkeypatch):
    """In a field of 17 elements, where all can be counted: t − 1 shares of each secret take every pair of values once
    for each choice of coefficients."""
    monkeypatch.setattr(shamir, "PRIME", 17)
    tables = []
    for secret in (0, 5, 16):
        seen = {}
        for coefficients in itertools.product(range(17), repeat=2):
            pair = tuple(shamir._value([*coefficients, secret], point) for point in (3, 9))
            seen[pair] = seen.get(pair, 0) + 1
        tables.append(seen)
    assert tables[0] == tables[1] == tables[2]
    assert set(tables[0].values()) == {1}
    assert len(tables[0]) == 17**2


def test_coefficients_are_drawn_from_the_whole_field(monkeypatch):
    """The last too, which may be zero, and anew for each secret."""
    asked = []
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: asked.append(below) or below - 1 - len(asked))
    split(bytes(32), [1, 2, 3, 4], 4)
    assert asked == [PRIME] * 3


def test_a_secrets_shares_are_another_each_time():
    assert split(bytes(32), [1, 2], 2) != split(bytes(32), [1, 2], 2)


def test_shares_are_spread_over_the_field():
    """Chi-squared over 16 bins of the leading bits, of a constant secret's shares: P < 1e-9 above 80."""
    counts = [0] * 16
    for _ in range(800):
        for share in split(bytes(32), [1, 2, 3, 4], 2).values():
            counts[min(int.from_bytes(share, "big") >> 252, 15)] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 80


@pytest.mark.parametrize(
    ("secret", "points", "threshold", "match"),
    [
        (bytes(31), [1, 2], 2, "32 bytes, not 31"),
        (bytes(33), [1, 2], 2, "32 bytes, not 33"),
        (bytes(32), [0, 1], 2, r"distinct points from 1 to 255: \[0\]"),
        (bytes(32), [1, 256], 2, r"\[256\]"),
        (bytes(32), [-1, 2], 2, r"\[-1\]"),
        (bytes(32), [7, 7, 3], 2, r"\[7\]"),
        (bytes(32), [True, 2], 2, r"\[True\]"),
        (bytes(32), [1, 2, 3], 1, "threshold of 1 for 3"),
        (bytes(32), [1, 2, 3], 4, "give 2 to 3"),
    ],
)
def test_what_cannot_be_dealt(secret, points, threshold, match):
    with pytest.raises(ConfigError, match=match):
        split(secret, points, threshold)


SHARE = bytes(32) + b"\x05"


@pytest.mark.parametrize(
    ("shares", "threshold", "match"),
    [
        ({1: SHARE}, 2, "1 shares of a secret that takes 2"),
        ({}, 2, "0 shares"),
        ({1: SHARE, 2: SHARE}, 1, "takes 1"),
        ({0: SHARE, 2: SHARE}, 2, r"distinct points from 1 to 255: \[0\]"),
        ({1: SHARE, 300: SHARE}, 2, r"\[300\]"),
        ({1: SHARE, "2": SHARE}, 2, r"\['2'\]"),
        ({1: SHARE, 2: SHARE[1:]}, 2, "share of point 2 is no element"),
        ({1: SHARE + b"\0", 2: SHARE}, 2, "share of point 1 is no element"),
        ({1: SHARE, 2: PRIME.to_bytes(33, "big")}, 2, "share of point 2 is no element"),
        ({1: SHARE, 2: b"\xff" * 33}, 2, "share of point 2 is no element"),
    ],
)
def test_what_cannot_be_joined(shares, threshold, match):
    with pytest.raises(ProtocolError, match=match):
        join(shares, threshold)


@pytest.mark.parametrize("value", [2**256, 2**256 + 296])
def test_what_is_no_secret_is_refused(value):
    """A constant polynomial: its value at 0 is an element of the field, and not of 32 bytes."""
    with pytest.raises(ProtocolError, match="give no secret"):
        join({point: value.to_bytes(33, "big") for point in (1, 2)}, 2)


def test_one_wrong_share_gives_another_secret():
    shares = split(b"\x07" * 32, [1, 2, 3], 3)
    shares[2] = ((int.from_bytes(shares[2], "big") + 1) % PRIME).to_bytes(33, "big")
    # The value at 2 counts -3 times there.
    assert join(shares, 3) == (int.from_bytes(b"\x07" * 32, "big") - 3).to_bytes(32, "big")


@given(st.dictionaries(st.integers(1, 6), st.binary(max_size=34), max_size=6), st.integers(-1, 7))
def test_random_bytes_are_refused_by_our_errors(shares, threshold):
    try:
        assert len(join(shares, threshold)) == 32
    except ProtocolError:
        pass
