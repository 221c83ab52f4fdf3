"""The stages of pretraining: which recipe holds at a global step, and how weights enter a stage.

A stage is what a run of its own is in the reference: its own crops, batch and schedules, from the
weights of the stage before.  Unlike there, position embeddings are interpolated instead of drawn
anew, the teacher keeps its average, and the optimizer its moments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from chexfound.model.vit import resize_positions
from chexfound.recipe import changed
from chexfound.schema import Recipe, Stage

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


def enter(tensors: Mapping[str, Tensor], recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Weights, or a whole state, made to fit the stage of a global step: positions are interpolated.

    The squares of Adam's moments stay above 0.  A state that fits is given back as it is.
    """
    stage, number = at(recipe, step)
    if not number:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_A_STAGE)}
    return with_grid(tensors, stage.crops.global_crops_size // stage.student.patch_size)


def with_grid(tensors: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Every position embedding among the tensors (and its moments) for grid × grid patches."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        parameter = name.removesuffix(".exp_avg_sq").removesuffix(".exp_avg")
        if parameter == "pos_embed" or parameter.endswith(".pos_embed"):
            resized = resize_positions(tensor, grid, grid)
            result[name] = resized
            if name.endswith(".exp_avg_sq") and resized is not tensor:
                # Moments of one gradient keep m² ≤ v times a number from 1 up (server/checks.py); each resized
                # alone, they would not.
                mean = resize_positions(tensors.get(f"{parameter}.exp_avg", torch.zeros_like(tensor)), grid, grid)
                result[name] = torch.maximum(resized, mean.square())
    return result
