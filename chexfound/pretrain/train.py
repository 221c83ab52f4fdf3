"""K local steps of self-supervised pretraining: what a site, or the pooled data, does between rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chexfound import rng
from chexfound.data import augment
from chexfound.data.sampler import EndlessSampler
from chexfound.errors import DataError
from chexfound.model.checkpoint import load_tensors
from chexfound.pretrain import masking, optimizer, schedules
from chexfound.pretrain.meta_arch import SUBMODULES, Batch, SSLMetaArch
from chexfound.schema import ARCHS, Recipe

Progress = Callable[[int, int], None]


def make_batch(recipe: Recipe, images: np.ndarray, step: int, roster_index: int) -> Batch:
    """Crops and masks of a step, from its own stream: images uint8 (B, H, W)."""
    generator = rng.numpy_generator(recipe.seed, "pretrain", step, roster_index, "augment")
    global_crops, local_crops = augment.multi_crop(images, recipe.crops, generator)
    masks = masking.batch_masks(
        len(global_crops),
        recipe.crops.global_crops_size // recipe.student.patch_size,
        recipe.ibot.mask_sample_probability,
        recipe.ibot.mask_ratio_min_max,
        generator,
    )
    return Batch(*(torch.from_numpy(array) for array in (global_crops, local_crops, masks)))


def initial_weights(recipe: Recipe) -> dict[str, Tensor]:
    """What every arm and every site starts from, of what travels.

    `student.…`, an equal `teacher.…` if teachers are averaged, and `optimizer.…` (zeros, which is
    what an optimizer begins with) if its moments are.
    """
    model = _fresh(recipe)
    prefixes = ("student.", "teacher.") if recipe.teacher.policy == "average" else ("student.",)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    if recipe.train.optimizer_state == "average" and recipe.optim.optimizer == "adamw":
        weights |= optimizer.zero_moments(model.student)
    return weights


def _fresh(recipe: Recipe) -> SSLMetaArch:
    with rng.torch_stream(recipe.seed, "init", "pretrain"):
        return SSLMetaArch(recipe)


class Pretrainer:
    """Student, teacher and optimizer of one site, moved forward by global steps.

    Args:
        recipe: the run.
        pixels: gives uint8 (n, H, W) for positions 0 … n_images − 1 of the training images.
        n_images: how many there are.
        roster_index: the site's place among the sites sorted by name; names its random streams.
    """

    def __init__(
        self, recipe: Recipe, pixels: Callable[[np.ndarray], np.ndarray], n_images: int, roster_index: int
    ) -> None:
        if n_images < 1:
            raise DataError("no training image: pretraining needs at least one")
        self.recipe, self.pixels, self.n_images, self.roster_index = recipe, pixels, n_images, roster_index
        self.model = _fresh(recipe)
        self.optimizer = optimizer.build(self.model.student, ARCHS[recipe.student.arch][1], recipe.optim)

    def load_global(self, tensors: dict[str, Tensor]) -> None:
        """Start a round from the coordinator's weights; a teacher or moments that it does not send stay.

        Raises: CheckpointError naming what is missing, unexpected or of another shape.
        """
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith(optimizer.PREFIX)}
        weights = {name: tensor for name, tensor in tensors.items() if name not in moments}
        expected = self.global_names(teacher=any(name.startswith("teacher.") for name in weights))
        states = optimizer.checked_moments(self.model.student, moments)
        load_tensors(self.model, weights, expected)
        if moments:
            optimizer.set_moments(self.optimizer, states)

    def global_names(self, *, teacher: bool) -> list[str]:
        """Names of the tensors that travel."""
        prefixes = ("student.", "teacher.") if teacher else ("student.",)
        return [name for name in self.model.state_dict() if name.startswith(prefixes)]

    def global_tensors(self, *, teacher: bool) -> dict[str, Tensor]:
        """Copies of the tensors that travel."""
        state = self.model.state_dict()
        return {name: state[name].clone() for name in self.global_names(teacher=teacher)}

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments, where they travel."""
        return optimizer.moments(self.optimizer, self.model.student)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next round stands on: model, teacher, centres, optimizer moments."""
        tensors = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        return tensors | self.moments()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises: CheckpointError; nothing was changed then.
        """
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith(optimizer.PREFIX)}
        states = optimizer.checked_moments(self.model.student, moments)
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        load_tensors(self.model, model, list(self.model.state_dict()))
        optimizer.set_moments(self.optimizer, states)

    def run(
        self, first_step: int, steps: int, batch_size: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Take global steps first_step … first_step + steps − 1.

        Returns:
            One row a step: step, loss and its parts, log_k.

        Raises: DataError naming the step when loss or gradient is not finite; nothing was updated by it.
        """
        recipe = self.recipe
        sampler = EndlessSampler(self.n_images, batch_size, recipe.seed, "pretrain", self.roster_index)
        rows = []
        self.model.train()
        for step in range(first_step, first_step + steps):
            batch = make_batch(recipe, self.pixels(sampler.batch(step)), step, self.roster_index)
            with rng.torch_stream(recipe.seed, "pretrain", step, self.roster_index, "torch"):
                parts = self.step(batch, step)
            rows.append({"step": step, **parts, "log_k": math.log(recipe.dino.head_n_prototypes)})
            if progress is not None:
                progress(step - first_step + 1, steps)
        return rows

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step and the teacher's EMA; returns the loss and its parts."""
        values = schedules.at(self.recipe, step)
        optimizer.apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self.model(batch, values.teacher_temp)
        if not torch.isfinite(loss):
            raise DataError(
                f"pretraining step {step}: the loss is {loss.item()}; lower optim.lr or raise teacher.teacher_temp"
            )
        loss.backward()
        for name in SUBMODULES:
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.student[name].parameters(), self.recipe.optim.clip_grad or math.inf
            )
            if not torch.isfinite(norm):
                raise DataError(
                    f"pretraining step {step}: the gradient of the {name} has the norm {norm.item()}; lower optim.lr"
                )
        self.optimizer.step()
        self.model.update_teacher(values.momentum)
        return {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
