from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chexfound import rng

PARTS = st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=5)


def test_a_seed_is_what_the_docstring_says():
    text = b"\x00\x00\x00\x010" + b"\x00\x00\x00\x05split"
    assert rng.derive(0, "split") == int(hashlib.sha256(text).hexdigest()[:16], 16) // 2


@given(PARTS)
def test_a_seed_has_63_bits_and_depends_on_the_name_alone(name):
    assert 0 <= rng.derive(*name) < 2**63
    assert rng.derive(*name) == rng.derive(*name)


@given(PARTS, PARTS)
def test_other_names_give_other_seeds(one, other):
    same = [str(part) for part in one] == [str(part) for part in other]
    assert (rng.derive(*one) == rng.derive(*other)) == same


def test_where_a_part_ends_counts():
    assert rng.derive("ab", "c") != rng.derive("a", "bc") != rng.derive("abc")
    assert rng.derive("1", "2") != rng.derive("12")


def test_generators_repeat():
    first = rng.numpy_generator(7, "augment", 3).random(4)
    assert np.array_equal(first, rng.numpy_generator(7, "augment", 3).random(4))
    assert not np.array_equal(first, rng.numpy_generator(7, "augment", 4).random(4))


def test_the_global_state_is_left_alone():
    np_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    rng.numpy_generator(1, "a").random(10)
    with rng.torch_stream(1, "a"):
        inside = torch.rand(3)
    assert np.array_equal(np_before, np.random.get_state()[1])
    assert torch.equal(torch_before, torch.get_rng_state())
    with rng.torch_stream(1, "a"):
        assert torch.equal(inside, torch.rand(3))


def test_the_stream_is_put_back_after_an_exception():
    def draw_and_fail() -> None:
        with rng.torch_stream(1):
            torch.rand(1)
            raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert torch.equal(before, torch.get_rng_state())


def test_unit_interval_is_uniform():
    values = np.array([rng.unit_interval(0, "split", f"patient-{i}") for i in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
