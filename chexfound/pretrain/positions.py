"""The stages of pretraining: which recipe holds at a global step, and how weights enter a stage.

A stage is what a run of its own is in the reference: its own crops, batch and schedules, from the
weights of the stage before.  Unlike there, position embeddings are interpolated instead of drawn
anew, the teacher keeps its average, and the optimizer its moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from chexfound.model.vit import resize_positions
from chexfound.recipe.curriculum import OF_A_STAGE, at
from chexfound.recipe.schema import Recipe


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
                # Moments of one gradient keep m² ≤ v times a number from 1 up (server/rounds/validation.py);
                # each resized alone, they would not.
                mean = resize_positions(tensors.get(f"{parameter}.exp_avg", torch.zeros_like(tensor)), grid, grid)
                result[name] = torch.maximum(resized, mean.square())
    return result
