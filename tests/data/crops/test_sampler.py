from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data.crops.sampler import EndlessSampler


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_permutation_after_permutation_covers_all(n_images, batch_size, first_pass):
    sampler = EndlessSampler(n_images, batch_size, 0, "pretrain", 0)
    first = first_pass * n_images // batch_size
    last = -(-(first_pass + 2) * n_images // batch_size)
    batches = [sampler.batch(step) for step in range(first, last)]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in batches)  # never a short one
    flat = np.concatenate(batches)
    for number in (first_pass, first_pass + 1):
        start = number * n_images - first * batch_size
        assert sorted(flat[start : start + n_images]) == list(range(n_images))


@given(st.integers(1, 20), st.integers(1, 30), st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_batch_is_a_function_of_the_step_alone(n_images, batch_size, steps):
    sampler = EndlessSampler(n_images, batch_size, 3, "adapt", 1)
    in_order = {step: sampler.batch(step) for step in sorted(set(steps))}
    for step in steps:
        assert np.array_equal(sampler.batch(step), in_order[step])
        assert np.array_equal(EndlessSampler(n_images, batch_size, 3, "adapt", 1).batch(step), in_order[step])


def test_streams_differ_by_seed_phase_and_roster_index_and_passes_differ():
    def all_of(*stream: int | str, step: int = 0) -> tuple[int, ...]:
        return tuple(EndlessSampler(50, 50, *stream).batch(step))

    orders = [
        all_of(0, "pretrain", 0),
        all_of(0, "pretrain", 1),
        all_of(1, "pretrain", 0),
        all_of(0, "adapt", 0),
        all_of(0, "pretrain", 0, step=1),
    ]
    assert len(set(orders)) == len(orders)


def test_a_batch_larger_than_the_site_takes_each_image_equally_often():
    batch = EndlessSampler(3, 12, 0, "pretrain", 0).batch(7)
    assert np.bincount(batch).tolist() == [4, 4, 4]
