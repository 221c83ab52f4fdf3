"""The teacher that nobody sends: its closed form, and what a stage change does to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chexfound.pretrain import positions, schedules, teacher
from chexfound.pretrain.train import Pretrainer, initial_weights
from chexfound.recipe import load as recipes

VALUE = st.floats(-100, 100, allow_nan=False)


@given(
    ends=st.lists(VALUE, min_size=3, max_size=3),
    momentum=st.floats(0, 1),
    final=st.floats(0, 1),
    warmup=st.integers(0, 40),
    local_steps=st.integers(1, 30),
    number=st.integers(0, 9),
)
def test_the_closed_form_is_the_recursion_on_a_straight_path(
    ends: list[float], momentum: float, final: float, warmup: int, local_steps: int, number: int
) -> None:
    """In float64, with the schedules' own momentum and learning rate at each step."""
    recipe = recipes.load(
        "demo",
        {
            "train.rounds": 10,
            "train.local_steps": local_steps,
            "teacher.momentum_teacher": momentum,
            "teacher.final_momentum_teacher": final,
            "optim.warmup_epochs": warmup / 10,
        },
    )
    first = number * local_steps
    t0, s0, s1 = ends
    steps = [schedules.at(recipe, first + j) for j in range(local_steps)]
    all_rates, expected, student = sum(step.lr for step in steps), t0, s0
    for step in steps:
        student += (s1 - s0) * (step.lr / all_rates if all_rates else 1 / local_steps)
        expected = step.momentum * expected + (1 - step.momentum) * student
    a, b, c = teacher.coefficients(recipe, first, local_steps)
    assert a * t0 + b * s0 + c * s1 == pytest.approx(expected, abs=1e-8)  # 12 digits of a coefficient, of values of 100
    assert a + b + c == pytest.approx(1, abs=1e-15)


def test_one_momentum_for_all_steps_gives_the_published_sum() -> None:
    """w = Σ_j (1 − m)·m^(k − j)·j/k; by hand for m = 1/2, k = 2: w = 1/2·1/2·1/2 + 1/2 = 5/8, mᵏ = 1/4."""
    same = {"train.local_steps": 2, "teacher.momentum_teacher": 0.5, "teacher.final_momentum_teacher": 0.5}
    constant = {"optim.warmup_epochs": 0, "optim.min_lr": 1.0}  # a cosine from lr to min(min_lr, lr)
    assert teacher.coefficients(recipes.load("demo", same | constant), 0, 2) == (0.25, 0.125, 0.625)


def test_the_warm_ups_first_step_goes_nowhere() -> None:
    """By hand: rates 0 and 1/9 of two steps, so p = 0, 1; with m = 1/2: c = 1/2, b = 1 − 1/4 − 1/2."""
    values = {"train.local_steps": 2, "teacher.momentum_teacher": 0.5, "teacher.final_momentum_teacher": 0.5}
    assert teacher.coefficients(recipes.load("demo", values), 0, 2) == (0.25, 0.25, 0.5)


def test_momentum_at_its_ends() -> None:
    """A teacher that never moves, and one that is the student."""
    for momentum, expected in ((1.0, (1.0, 0.0, 0.0)), (0.0, (0.0, 0.0, 1.0))):
        values = {"teacher.momentum_teacher": momentum, "teacher.final_momentum_teacher": momentum}
        assert teacher.coefficients(recipes.load("demo", values), 5, 5) == expected


def test_one_step_a_round_is_the_teachers_own_step(small, images) -> None:
    """With k = 1 the path is straight: the derived teacher is the EMA, to float32's rounding."""
    recipe = small(teacher__policy="rederive", train__local_steps=1)
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    one.run(0, 3, 4)
    before = one.global_tensors(teacher=True)
    one.run(3, 1, 4)
    after = one.global_tensors(teacher=True)
    derived = teacher.rederived(recipe, 4, before, after)
    assert set(derived) == {name for name in after if name.startswith("teacher.")}
    for name, tensor in derived.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in derived.items())


def test_several_steps_come_close_to_the_teachers_own(small, images) -> None:
    """The error, over how far the teacher went: real paths bend (here by 0.08 of it)."""
    recipe = small(teacher__policy="rederive", train__local_steps=5, train__rounds=4, optim__warmup_epochs=0)
    one = Pretrainer(recipe, lambda places: images[places], len(images), 0)
    one.run(0, 5, 8)
    before = one.global_tensors(teacher=True)
    one.run(5, 5, 8)
    after = one.global_tensors(teacher=True)
    derived = teacher.rederived(recipe, 10, before, after)

    def distance(this, that) -> float:
        return math.sqrt(sum(float((this[name] - that[name]).double().square().sum()) for name in derived))

    assert distance(derived, after) < 0.2 * distance(before, after)


def test_weights_that_do_not_move_stay_as_they_are(small) -> None:
    recipe = small(teacher__policy="rederive")
    start = initial_weights(recipe)
    derived = teacher.rederived(recipe, 3, start, start)
    assert derived
    for name, tensor in derived.items():
        assert torch.equal(tensor, start[name])


def test_what_was_before_is_brought_into_the_stage_that_begins(small) -> None:
    recipe = small(
        teacher__policy="rederive",
        curriculum=({"rounds": 2, "global_crops_size": 64, "local_crops_size": 32},),
    )
    step = recipe.train.rounds * recipe.train.local_steps
    lots = torch.Generator().manual_seed(0)
    before = {name: torch.randn(tensor.shape, generator=lots) for name, tensor in initial_weights(recipe).items()}
    after = positions.enter(
        {name: tensor + 1 for name, tensor in before.items() if name.startswith("student.")}, recipe, step
    )
    derived = teacher.rederived(recipe, step, before, after)
    a, b, c = teacher.coefficients(recipe, step - 3, 3)
    resized = positions.enter(before, recipe, step)
    name = "backbone.pos_embed"
    assert before[f"teacher.{name}"].shape[1] == 1 + 4
    assert derived[f"teacher.{name}"].shape[1] == 1 + 16
    expected = (
        a * resized[f"teacher.{name}"].double()
        + b * resized[f"student.{name}"].double()
        + c * after[f"student.{name}"].double()
    )
    np.testing.assert_allclose(derived[f"teacher.{name}"], expected, rtol=1e-6, atol=1e-6)
