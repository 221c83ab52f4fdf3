"""How many sites, colluders and shares: what protects, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from chexfound.secagg.parameters import MINIMUM, SITES_MAX, Parameters, colluders_max, labelling

SIZES = range(MINIMUM, SITES_MAX + 1)

# By hand from 2t > n + c and t - c >= 2, c a quarter of n; the last column, how many may be lost.
TABLE = [
    (3, 0, 2, 0),
    (4, 1, 3, 1),
    (5, 1, 4, 1),
    (6, 1, 4, 2),
    (7, 1, 5, 2),
    (8, 2, 6, 2),
    (9, 2, 6, 3),
    (10, 2, 7, 3),
    (12, 3, 8, 4),
    (16, 4, 11, 5),
    (20, 5, 13, 7),
    (32, 8, 21, 11),
    (50, 12, 32, 18),
    (64, 16, 41, 23),
    (100, 25, 63, 37),
    (128, 32, 81, 47),
]


@pytest.mark.parametrize(("n", "c", "t", "dropouts"), TABLE)
def test_the_table(n: int, c: int, t: int, dropouts: int) -> None:
    parameters = Parameters.of(n)
    assert (parameters.c, parameters.t, parameters.dropouts) == (c, t, dropouts)
    assert parameters.shared() == {"n": n, "c": c, "t": t}


@pytest.mark.parametrize("n", SIZES)
def test_the_threshold_is_the_smallest_that_protects(n: int) -> None:
    for c in range(colluders_max(n) + 1):
        t = Parameters.of(n, c).t
        assert 2 * t > n + c  # two sets of t share a site that is honest
        assert t - c >= 2  # and a sum is over two honest ones
        assert t <= n
        with pytest.raises(ConfigError, match="cannot hold against"):
            Parameters(n=n, c=c, t=t - 1)


@given(st.integers(-2, 140), st.integers(-3, 140), st.integers(-3, 140), st.integers(-3, 140))
def test_what_is_made_protects(n: int, c: int, t: int, minimum: int) -> None:
    try:
        parameters = Parameters(n=n, c=c, t=t, minimum=minimum)
    except ConfigError:
        assert not (3 <= n <= 128 and c >= 0 and t <= n and 2 * t > n + c and t - c >= 2 and 3 <= minimum <= n)
        return
    assert 3 <= n <= 128
    assert 0 <= c <= t - 2
    assert n + c < 2 * t <= 2 * n
    assert parameters.survivors == max(t, minimum) <= n
    assert parameters.dropouts == n - parameters.survivors >= 0


def test_a_site_s_own_minimum_is_over_the_threshold() -> None:
    assert Parameters.of(3).survivors == 3  # t is 2
    assert Parameters.of(8).survivors == 6
    assert Parameters.of(8, minimum=7).survivors == 7
    assert Parameters.of(8, minimum=7).shared() == Parameters.of(8).shared()  # each site's own, and not told alike


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((2,), "for 3 to 128 sites; this federation has 2"),
        ((0,), "this federation has 0"),
        ((129,), "this federation has 129"),
        ((4, 3), "c is at most 2"),
        ((4, -1), "c = -1 colluders"),
        ((128, 127), "c is at most 126"),
        ((8, None, 2), "minimum must be 3 to 8"),
        ((8, None, 9), "minimum must be 3 to 8"),
    ],
)
def test_refusals(given: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Parameters.of(*given)


def test_the_most_colluders_leave_a_sum_of_all() -> None:
    for n in SIZES:
        parameters = Parameters.of(n, colluders_max(n))
        assert (parameters.t, parameters.dropouts) == (n, 0)
        with pytest.raises(ConfigError):
            Parameters.of(n, colluders_max(n) + 1)
        with pytest.raises(ConfigError):  # though 2t > n + c: of a sum of all, all but one know the one's part
            Parameters(n=n, c=n - 1, t=n)


@given(st.integers(0, 128), st.integers(0, 126))
def test_of_those_that_label_two_are_left_when_colluders_are_taken_off(minimum: int, c: int) -> None:
    least = labelling(minimum, c)
    assert least - c >= 2
    assert least >= minimum
    assert least in (minimum, c + 2)  # and no more than either asks
