"""Shamir's secret sharing of 32-byte secrets in the field of 2**256 + 297 elements.

Guarantee: any `threshold` shares rebuild the secret, and fewer are distributed independently of it, whatever the
computing power (Shamir 1979; Bonawitz et al. 2017, 3.1).  Not in it: a share says nothing of whether it is right; what
a holder returns is held against the dealer's signed hash, and what is rebuilt against the dealer's commitment.

Arithmetic is Python's and takes time that depends on the numbers.  Each secret is shared once, under coefficients that
are used for nothing else, and no one times a site's dealing more often than that.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping, Sequence

from chexfound.errors import ConfigError, ProtocolError

# The smallest prime above 2**256, so that every 32-byte secret is an element.  tests/secagg/test_shamir.py proves both.
PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
POINTS = range(1, 256)


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Deal a secret over points, one share each, so that any `threshold` of them rebuild it.

    Args:
        secret: 32 bytes.
        points: distinct, 1 … 255: of the holders.
        threshold: 2 … len(points).

    Returns: 33 bytes for each point: the polynomial's value, big-endian.

    Raises: ConfigError if one of the three is not so.
    """
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"a secret to be shared has {SECRET_BYTES} bytes, not {len(secret)}")
    if odd := _not_points(points):
        raise ConfigError(f"shares are dealt to distinct points from 1 to 255: {odd}")
    if not 2 <= threshold <= len(points):
        raise ConfigError(f"a threshold of {threshold} for {len(points)} holders: give 2 to {len(points)}")
    # Highest power first, the secret last; the highest may be zero, else the shares would tell something.
    coefficients = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), int.from_bytes(secret, "big")]
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points}


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of at least `threshold` shares, by their points; of more, those of the lowest points are taken.

    The coefficients of the last sets of points are kept, so that many secrets with the same holders cost one
    multiplication a share.

    Raises: ProtocolError if there are too few, one is no share, or what they give is no secret.
    """
    if odd := _not_points(shares):
        raise ProtocolError(f"shares come from distinct points from 1 to 255: {odd}")
    if not 2 <= threshold <= len(shares):
        raise ProtocolError(f"{len(shares)} shares of a secret that takes {threshold}")
    points = tuple(sorted(shares)[:threshold])
    values = [_element(shares[point], point) for point in points]
    secret = sum(map(int.__mul__, lagrange(points), values)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError("shares that give no secret: one is wrong, or they were dealt wrongly")
    return secret.to_bytes(SECRET_BYTES, "big")


@functools.lru_cache(maxsize=16)
def lagrange(points: tuple[int, ...]) -> tuple[int, ...]:
    """Give the Lagrange coefficient of each point for the polynomial's value at 0, modulo `PRIME`."""
    found = []
    for point in points:
        over, under = 1, 1
        for other in points:
            if other != point:
                over, under = over * other % PRIME, under * (other - point) % PRIME
        found.append(over * pow(under, -1, PRIME) % PRIME)
    return tuple(found)


def _value(coefficients: Iterable[int], point: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value


def _element(share: bytes, point: int) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError(f"the share of point {point} is no element of the field in {SHARE_BYTES} bytes")
    return value


def _not_points(points: Iterable[int]) -> list[object]:
    """The points that are no points, or that come twice."""
    seen: set[int] = set()
    odd: list[object] = []
    for point in points:
        # True is an int, and equal to 1.
        if type(point) is not int or point not in POINTS or point in seen:
            odd.append(point)
        else:
            seen.add(point)
    return odd[:3]
