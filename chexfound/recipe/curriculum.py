"""The stages of pretraining: which recipe holds at a global step."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeVar

from chexfound.recipe.schema import Recipe, Stage

OF_A_STAGE = "queue."  # names of state that does not outlive its stage: another batch, seen at another size


def at(recipe: Recipe, step: int) -> tuple[Recipe, int]:
    """The recipe that holds at a global step (one without a curriculum), and the step's number in its stage."""
    index, first = _place(recipe, step)
    return _stage_recipe(recipe, index), step - first


def index_at(recipe: Recipe, step: int) -> int:
    """Which stage a global step belongs to; 0 is the first."""
    return _place(recipe, step)[0]


def stages(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage, in order."""
    return [_stage_recipe(recipe, index) for index in range(1 + len(recipe.curriculum))]


def _place(recipe: Recipe, step: int) -> tuple[int, int]:
    """(stage, its first global step); a step past the end belongs to the last."""
    index = first = 0
    rounds = recipe.train.rounds
    for stage in recipe.curriculum:
        after = first + rounds * recipe.train.local_steps
        if step < after:
            break
        index, first, rounds = index + 1, after, stage.rounds
    return index, first


@functools.lru_cache(maxsize=64)
def _stage_recipe(recipe: Recipe, index: int) -> Recipe:
    result = changed(recipe, curriculum=())
    for stage in recipe.curriculum[:index]:
        result = _followed_by(result, stage)
    optim = result.optim
    if optim.scaling_rule is None:
        return result
    batch = result.train.pooled_batch_size
    assert optim.base_lr is not None  # recipe.py sees to both
    assert batch is not None
    lr = optim.base_lr * math.sqrt(batch / 1024)
    return changed(result, optim=changed(optim, lr=lr, base_lr=None, scaling_rule=None))


def _followed_by(recipe: Recipe, stage: Stage) -> Recipe:
    train: dict[str, int | None] = {"rounds": stage.rounds}
    if stage.batch_size is not None or stage.pooled_batch_size is not None:
        train |= {"batch_size": stage.batch_size, "pooled_batch_size": stage.pooled_batch_size}
    optim: dict[str, float] = {"freeze_last_layer_epochs": 0.0}
    optim |= {name: value for name in ("lr", "base_lr", "warmup_epochs") if (value := getattr(stage, name)) is not None}
    teacher: dict[str, float] = {"warmup_teacher_temp_epochs": 0.0}
    if stage.momentum_teacher is not None:
        teacher["momentum_teacher"] = stage.momentum_teacher
    return changed(
        recipe,
        train=changed(recipe.train, **train),
        crops=changed(recipe.crops, global_crops_size=stage.global_crops_size, local_crops_size=stage.local_crops_size),
        optim=changed(recipe.optim, **optim),
        teacher=changed(recipe.teacher, **teacher),
    )


Section = TypeVar("Section")


def changed(section: Section, **values: Any) -> Section:
    """A recipe, or a section of one, with other values (not checked again)."""
    return dataclasses.replace(section, **values)  # type: ignore[type-var]
