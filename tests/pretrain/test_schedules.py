from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.pretrain import schedules
from chexfound.pretrain.schedules import cosine
from chexfound.recipe import load as recipes

# The reference's run: 12 epochs of 5 iterations.
RUN = {
    "train.rounds": 12,
    "train.local_steps": 5,
    "train.OFFICIAL_EPOCH_LENGTH": 5,
    "optim.lr": 2e-4,
    "optim.min_lr": 1e-6,
    "optim.warmup_epochs": 2,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.2,
    "optim.freeze_last_layer_epochs": 1,
    "teacher.momentum_teacher": 0.994,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 4,
}
NAMES = {
    "lr": "lr",
    "wd": "weight_decay",
    "momentum": "momentum",
    "teacher_temp": "teacher_temp",
    "last_layer_lr": "last_layer_lr",
}


@pytest.mark.parametrize("name", NAMES)
def test_all_schedules_of_a_run_and_ten_steps_past_its_end(reference: Path, name):
    with np.load(reference / "schedule.npz") as arrays:
        expected = arrays[name]
    recipe = recipes.load("demo", RUN)
    result = [getattr(schedules.at(recipe, step), NAMES[name]) for step in range(len(expected))]
    assert len(expected) == recipe.pretrain_steps + 10
    assert np.abs(np.array(result) - expected).max() < 1e-12


def test_freeze_and_warm_up_together(reference: Path):
    with np.load(reference / "schedule.npz") as arrays:
        expected = arrays["generic_freeze3_warm4_total20"]
    result = [cosine(step, 1.0, 0.1, 20, warmup=4, start=0.2, freeze=3) for step in range(len(expected))]
    assert np.abs(np.array(result) - expected).max() < 1e-12


def test_a_cosine_by_hand():
    """Warm-up 0, ½, 1 (its last point is repeated), then the cosine from 1 to 0 in 4 steps."""
    values = [cosine(step, 1.0, 0.0, 7, warmup=3) for step in range(9)]
    half = math.sqrt(0.5)
    assert values == pytest.approx([0, 0.5, 1, 1, 0.5 + half / 2, 0.5, 0.5 - half / 2, 0, 0], abs=1e-15)


@given(st.integers(1, 50), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 60), st.integers(0, 10))
def test_a_cosine_stays_between_its_ends(total, warmup, base, final, step, freeze):
    value = cosine(step, base, final, total, warmup=min(warmup, total), freeze=min(freeze, total - min(warmup, total)))
    assert min(0.0, base, final) - 1e-12 <= value <= max(base, final) + 1e-12
    assert cosine(total, base, final, total) == final


def test_at_is_made_of_cosines():
    recipe = recipes.load("demo", RUN)
    for step in (0, 1, 4, 5, 9, 10, 19, 20, 33, 59, 60, 100):
        values = schedules.at(recipe, step)
        assert values.lr == cosine(step, 2e-4, 1e-6, 60, warmup=10)
        assert values.last_layer_lr == (0.0 if step < 5 else values.lr)
        assert values.weight_decay == cosine(step, 0.04, 0.2, 60)
        assert values.momentum == cosine(step, 0.994, 1.0, 60)
        assert values.teacher_temp == pytest.approx(0.07 if step >= 20 else 0.04 + 0.03 * step / 19, abs=1e-15)


def test_a_run_shorter_than_its_warm_up_and_a_rate_below_the_minimum():
    recipe = recipes.load(
        "demo", {"train.rounds": 1, "train.local_steps": 4, "optim.lr": 1e-7, "optim.warmup_epochs": 9}
    )
    rates = [schedules.at(recipe, step).lr for step in range(6)]
    assert rates == pytest.approx([0, 1e-7 / 3, 2e-7 / 3, 1e-7, 1e-7, 1e-7], rel=1e-12)
