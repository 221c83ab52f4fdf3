"""Schedules by the global step.  The coordinator sends the step; a site never counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chexfound.recipe import curriculum
from chexfound.recipe.schema import Recipe


def cosine(
    step: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0, freeze: int = 0
) -> float:
    """DINOv2's CosineScheduler at `step`.

    `freeze` steps of 0, `warmup` steps linear from `start` to `base` (the last one is `base`, which
    the cosine then repeats), and a cosine that reaches `final` only past the last step.
    """
    if step >= total:
        return final
    if step < freeze:
        return 0.0
    step -= freeze
    if step < warmup:
        return base if warmup == 1 else start + (base - start) * step / (warmup - 1)
    length = total - warmup - freeze
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / length))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The values of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


def at(recipe: Recipe, step: int) -> Schedule:
    """All schedules of pretraining at a global step; those of a curriculum begin anew in each stage."""
    recipe, step = curriculum.at(recipe, step)
    optim, teacher, epoch = recipe.optim, recipe.teacher, recipe.train.OFFICIAL_EPOCH_LENGTH
    total = recipe.pretrain_steps
    warmup = min(int(optim.warmup_epochs * epoch), total)
    temp_steps = int(teacher.warmup_teacher_temp_epochs * epoch)
    lr = cosine(step, optim.lr, min(optim.min_lr, optim.lr), total, warmup=warmup)
    frozen = step < int(optim.freeze_last_layer_epochs * epoch)
    return Schedule(
        lr=lr,
        last_layer_lr=0.0 if frozen else lr,
        weight_decay=cosine(step, optim.weight_decay, optim.weight_decay_end, total),
        momentum=cosine(step, teacher.momentum_teacher, teacher.final_momentum_teacher, total),
        teacher_temp=cosine(
            step,
            teacher.teacher_temp,
            teacher.teacher_temp,
            temp_steps,
            warmup=temp_steps,
            start=teacher.warmup_teacher_temp,
        ),
    )
