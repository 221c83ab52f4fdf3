from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chexfound.errors import ConfigError, ProtocolError
from chexfound.secagg import fixed
from chexfound.secagg.fixed import LEVELS, Layout, Section, decode, levels

SPREAD = np.array([-(2**15), -(2**15) + 1, -(2**14), -1, 0, 1, 2**14, 2**15 - 2, 2**15 - 1], np.int16)


def rounded(values, scales, limit, noise, ring=64):
    """Integers and the number of clipped values, of a flat chunk."""
    values, noise = np.asarray(values, np.float32), np.asarray(noise, np.int16)
    steps, found = np.empty(values.shape), np.empty(values.shape, fixed.SIGNED[ring])
    clipped = fixed.quantise(values, np.asarray(scales, np.float64), limit, noise, steps)
    fixed.integers(steps, found)
    return found, clipped


# -- layouts


def layout(n=5):
    sections = [Section("a", (3, 2), 32, 0.5), Section("seen", (), 32), Section("b", (4,), 16, 1.0)]
    return Layout((*sections, Section("wide", (2,), 64)), n)


def test_sections_stand_one_after_the_other_in_their_ring():
    held = layout()
    assert held.sizes == {16: 4, 32: 7, 64: 4}
    assert list(held.sizes) == [16, 32, 64]
    assert held.places == {
        "a": slice(0, 6), "seen": slice(6, 7), "b": slice(0, 4), "wide": slice(0, 2), "clipped": slice(2, 4),
    }  # fmt: skip
    assert held.payload_bytes == 4 * 2 + 7 * 4 + 4 * 8
    assert {ring: (array.dtype.str, len(array)) for ring, array in held.zeros().items()} == {
        16: ("<u2", 4), 32: ("<u4", 7), 64: ("<u8", 4),
    }  # fmt: skip


def test_without_fixed_point_nothing_is_clipped():
    held = Layout((Section("seen", (3,), 32),), 4)
    assert held.payload == held.sections
    assert held.sizes == {32: 3}


def test_a_layout_goes_through_json_and_back():
    listed = layout().as_list()
    assert listed[0] == {"name": "a", "shape": [3, 2], "ring": 32, "range": 0.5}
    assert listed[1] == {"name": "seen", "shape": [], "ring": 32, "range": 0.0}
    assert Layout.from_list(listed, 5) == layout()
    # 1 and 1.0 are the same range, and make the same list.
    assert Layout((Section("a", (1,), 32, 1),), 3).as_list() == Layout((Section("a", (1,), 32, 1.0),), 3).as_list()


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (Section("", (1,), 32), "a name is a text"),
        (Section("clipped", (1,), 64), "kept for the counts"),
        (Section("a", (0,), 32), r"shape \(0,\)"),
        (Section("a", (-1,), 32), r"shape \(-1,\)"),
        (Section("a", (2.0,), 32), r"shape \(2.0,\)"),
        (Section("a", [2], 32), r"shape \[2\]"),
        (Section("a", (True,), 32), "shape"),
        (Section("a", (1,), 8), "ring 8: give one of 16, 32, 64"),
        (Section("a", (1,), 32.0), "ring 32.0"),
        (Section("a", (1,), 32, -1.0), "range -1.0"),
        (Section("a", (1,), 32, math.inf), "range inf"),
        (Section("a", (1,), 32, math.nan), "range nan"),
        (Section("a", (1,), 32, 1e-300), "range 1e-300"),
        (Section("a", (1,), 32, True), "range True"),
    ],
)
def test_what_is_no_section(section, match):
    with pytest.raises(ConfigError, match=match):
        Layout((section,), 5)


def test_all_that_is_wrong_with_a_layout_is_told():
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*n = 0.*'a'.*ring 7.*'a' is there twice"):
        Layout((Section("a", (1,), 32), Section("a", (1,), 7)), 0)
    with pytest.raises(ConfigError, match="no section"):
        Layout((), 5)
    with pytest.raises(ConfigError, match="16 bits does not hold the sum of 32768 sites"):
        Layout((Section("a", (1,), 16),), 32768)


@pytest.mark.parametrize(
    "listed",
    [
        "text", {"name": "a"}, [3], [{"name": "a"}], [{"name": "a", "shape": 3, "ring": 32, "range": 0.0}],
        [{"name": "a", "shape": [3], "ring": 32, "range": 0.0, "more": 1}],
        [{"name": ["a"], "shape": [3], "ring": 32, "range": 0.0}],
        [{"name": "a", "shape": "33", "ring": 32, "range": 0.0}],
        [{"name": "a", "shape": [3], "ring": [32], "range": 0.0}],
        [{"name": "a", "shape": [[3]], "ring": 32, "range": "1"}],
    ],
)  # fmt: skip
def test_what_is_no_list_of_sections(listed):
    with pytest.raises(ProtocolError, match="layout"):
        Layout.from_list(listed, 5)


@pytest.mark.parametrize("n", range(1, 129))
@pytest.mark.parametrize("ring", [16, 32, 64])
def test_the_sum_of_n_largest_fits_a_ring(ring, n):
    limit, half = levels(ring, n), 2 ** (ring - 1)
    assert 1 <= limit <= LEVELS
    assert -half <= -n * limit < n * limit < half
    assert limit == LEVELS or n * (limit + 1) >= half
    assert n * fixed.largest_count(ring, n) < 2**ring <= n * (fixed.largest_count(ring, n) + 1)


# -- rounding


@given(st.floats(-(2.0**22), 2.0**22, width=32), st.sampled_from([*SPREAD.tolist(), 12345]))
def test_rounding_never_takes_more_than_a_step(value, noise):
    found, _ = rounded([value], fixed.ONE, LEVELS, [noise])
    assert abs(found[0] - value) <= 1


@given(
    st.one_of(
        st.floats(-(2.0**22), 2.0**22, width=32),
        st.floats(-1, 1, width=32),
        st.floats(-(2.0**-20), 2.0**-20, width=32),
        st.integers(-(2**23), 2**23).map(lambda half: half / 2),
    )
)
@settings(max_examples=300)
def test_rounding_is_unbiased_at_every_magnitude(value):
    """The mean over all 2**16 noises: the integer rises with the noise, so bisection finds where."""

    def integer(noise):
        return int(rounded([value], fixed.ONE, LEVELS, [noise])[0][0])

    least, most = -(2**15), 2**15 - 1
    mean = Fraction(integer(least))
    for step in range(integer(least) + 1, integer(most) + 1):
        below, above = least, most
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (below, middle) if integer(middle) >= step else (middle, above)
        mean += Fraction(most + 1 - above, 2**16)
    assert abs(mean - Fraction(value)) <= Fraction(1, 2**16)


@pytest.mark.parametrize(
    "value", [2.0**22 - 0.25, 2.0**21 + 0.125, 2.0**20 + 0.0625, 0.3, 1e-3, -1e-3, -(2.0**22) + 0.25]
)
def test_rounding_is_unbiased_in_the_mean_of_many(value):
    """Seven standard errors of a mean of a million; floor(x + u) in float32 is off by 60 to 250 of them at the ends."""
    noise = np.random.default_rng(7).integers(-(2**15), 2**15, 10**6, dtype=np.int16)
    found, _ = rounded(np.full(10**6, value, np.float32), fixed.ONE, LEVELS, noise)
    part = value - math.floor(value)
    assert abs(found.mean() - np.float32(value)) < 7 * math.sqrt(part * (1 - part) / 10**6) + 2.0**-16


def test_noise_decides_by_the_fraction():
    assert rounded([0.25] * 9, fixed.ONE, None, SPREAD)[0].tolist() == [0] * 7 + [1] * 2
    assert rounded([4.0] * 9, fixed.ONE, None, SPREAD)[0].tolist() == [4] * 9
    assert rounded([-0.5] * 9, fixed.ONE, None, SPREAD)[0].tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("ring", [16, 32])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 100, 127, 128])
@pytest.mark.parametrize("size", [1.0, 1.0000001, 3.4e38, 1.0 - 2.0**-24])
def test_no_sum_overflows_at_the_extremes(ring, n, size):
    """n sites at the end of the range or far beyond it, at every extreme of the noise: the signed sum is right."""
    section = Section("a", (len(SPREAD),), ring, 1.0)
    held, limit = Layout((section,), n), levels(ring, n)
    scales = fixed.scale(section, n, 1.0)
    for sign in (1.0, -1.0):
        assert not fixed.reaches(0.5, scales, limit)
        found, clipped = rounded([sign * size] * len(SPREAD), scales, limit, SPREAD, ring)
        assert clipped == (len(SPREAD) if size > 1 else 0)
        assert int(np.abs(found.astype(np.int64)).max()) <= limit
        total = np.zeros(len(SPREAD), fixed.SIGNED[ring])
        for _ in range(n):
            total += found
        sums = {ring: total.view(fixed.UNSIGNED[ring]), 64: np.zeros(1, "<u8")}
        decoded = decode(held, sums)["a"]
        assert decoded == pytest.approx(n * found.astype(float) / limit)
        assert decoded == pytest.approx(sign * n, rel=1.01 / limit)


@pytest.mark.parametrize("ring", [16, 32, 64])
@given(
    n=st.integers(1, 128), peak=st.floats(0.5, 1.5, width=32),
    bound=st.floats(2.0**-126, 2.0**127), noise=st.sampled_from([-(2**15), 2**15 - 1]),
)  # fmt: skip
@settings(deadline=None)
def test_what_is_not_said_to_reach_the_limit_stays_in_it(ring, n, peak, bound, noise):
    section, limit = Section("a", (1,), ring, bound), levels(ring, n)
    scales = fixed.scale(section, n, 1.0)
    value = np.float32(peak * bound) if peak * bound < 3.4e38 else np.float32(3.4e38)
    if not fixed.reaches(float(value), scales, limit):
        found, _ = rounded([value, -value], scales, None, [noise, noise])
        assert int(np.abs(found).max()) <= limit
    if float(value) <= bound:
        assert rounded([value, -value], scales, limit, [noise, noise])[1] == 0


@given(
    n=st.integers(2, 128), ring=st.sampled_from([16, 32]), bound=st.floats(2.0**-100, 2.0**100), data=st.data()
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_weighted_mean_is_within_its_bound(n, ring, bound, data):
    """Without clipping it is off by |U3| · (R/L) / Σw at most, plus float rounding."""
    survivors = data.draw(st.integers(1, min(n, 6)))
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=survivors, max_size=survivors))
    section = Section("a", (3,), ring, bound)
    total, exact = np.zeros(3, fixed.SIGNED[ring]), [Fraction(0)] * 3
    for weight in weights:
        parts = data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
        values = np.array([part * bound * (1 - 2.0**-23) for part in parts], np.float32)
        noise = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=3, max_size=3))
        found, clipped = rounded(values, fixed.scale(section, n, weight), levels(ring, n), noise, ring)
        assert clipped == 0
        total += found
        exact = [one + Fraction(weight) * Fraction(float(value)) for one, value in zip(exact, values, strict=True)]
    sums = {ring: total.view(fixed.UNSIGNED[ring]), 64: np.zeros(1, "<u8")}
    mean = decode(Layout((section,), n), sums)["a"] / sum(weights)
    step = bound / levels(ring, n)
    for got, sum_ in zip(mean, exact, strict=True):
        off = abs(got - float(sum_ / Fraction(sum(weights))))
        assert off <= survivors * step / sum(weights) + 1e-12 * bound * survivors


def test_each_row_has_its_weight():
    section = Section("a", (3, 2), 32, 1.0)
    scales = fixed.scale(section, 1, np.array([0.0, 0.5, 1.0]))[:, None]
    steps, found = np.empty((3, 2)), np.empty(6, np.int32)
    fixed.quantise(np.full((3, 2), 0.5, np.float32), scales, LEVELS, np.zeros((3, 2), np.int16), steps)
    fixed.integers(steps.reshape(-1), found)
    assert found.tolist() == [0, 0, LEVELS // 4, LEVELS // 4, LEVELS // 2, LEVELS // 2]


@pytest.mark.parametrize(
    "weight", [-0.1, 1.1, math.nan, math.inf, [0.5, 0.5], [[0.1], [0.2], [0.3]], [0.1, 0.2, math.nan]]
)
def test_what_is_no_weight(weight):
    with pytest.raises(ProtocolError, match="section 'a': .*weight"):
        fixed.scale(Section("a", (3, 2), 32, 1.0), 4, np.array(weight))


# -- back


def test_decoding_gives_signed_sums_and_counts():
    held = layout(n=5)
    sums = held.zeros()
    sums[32][:] = [1, 2**32 - 1, 0, 7, 2**31 - 1, 2**31, 9]
    sums[16][:] = [1, 2**16 - 1, 2**15 - 1, 2**15]
    sums[64][:] = [2**64 - 1, 3, 4, 5]
    found = decode(held, sums)
    step = 0.5 / levels(32, 5)
    assert found["a"].tolist() == [[step, -step], [0, 7 * step], [(2**31 - 1) * step, -(2**31) * step]]
    assert found["a"].dtype == np.float64
    assert found["b"] == pytest.approx(np.array([1, -1, 2**15 - 1, -(2**15)]) / levels(16, 5))
    assert found["seen"].shape == ()
    assert int(found["seen"]) == 9
    assert found["wide"].tolist() == [2**64 - 1, 3]
    assert found["clipped"].tolist() == [4, 5]
    assert found["wide"].dtype == found["seen"].dtype == np.uint64


@pytest.mark.parametrize(
    "change",
    [
        lambda sums: sums.pop(16), lambda sums: sums.update({8: sums[16]}),
        lambda sums: sums.update({32: sums[32][1:]}), lambda sums: sums.update({32: sums[32].view("<i4")}),
        lambda sums: sums.update({32: sums[32].reshape(1, -1)}),
        lambda sums: sums.update({32: np.zeros(14, "<u4")[::2]}),
        lambda sums: sums.update({32: sums[32].astype(">u4")}),
    ],
)  # fmt: skip
def test_arrays_of_another_layout_are_refused(change):
    sums = layout().zeros()
    change(sums)
    with pytest.raises(ProtocolError, match=r"ring"):
        decode(layout(), sums)
