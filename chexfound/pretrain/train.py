"""K local steps of self-supervised pretraining: what a site, or the pooled data, does between rounds."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chexfound import rng
from chexfound.contract.request import MOMENTS
from chexfound.errors import CheckpointError, ConfigError, DataError, DivergedError
from chexfound.host import machine
from chexfound.model.checkpoint import load_tensors
from chexfound.model.vit import Block
from chexfound.parallel import group
from chexfound.pretrain import optimizer, schedules
from chexfound.pretrain.batches import Batches
from chexfound.pretrain.meta_arch import SUBMODULES, Batch, SSLMetaArch
from chexfound.recipe import curriculum
from chexfound.recipe.schema import ARCHS, Recipe

log = logging.getLogger("chexfound.pretrain")
Progress = Callable[[int, int], None]
QUEUE = curriculum.OF_A_STAGE + "dino"
Probe = Callable[[nn.Module, int], dict[str, float]]
SLOW = 2.0  # times as long as in float32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def initial_weights(recipe: Recipe) -> dict[str, Tensor]:
    """Give what every arm and every site starts from, of what travels, in the first stage.

    `student.…`, an equal `teacher.…` unless each site keeps its own, and `optimizer.…` (zeros, which is
    what an optimizer begins with) if its moments are averaged.
    """
    model = _fresh(curriculum.at(recipe, 0)[0])
    prefixes = ("student.",) if recipe.teacher.policy == "local" else ("student.", "teacher.")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    if recipe.train.optimizer_state == "average" and recipe.optim.optimizer == "adamw":
        weights |= optimizer.zero_moments(model.student)
    return weights


def check_gpus(recipe: Recipe, number: int) -> None:
    """Raise ConfigError if the recipe does not go with so many GPUs at a site."""
    if recipe.train.sinkhorn_queue and number > 1:
        raise ConfigError("train.sinkhorn_queue: one GPU a site keeps it; leave it 0, or train on one (--gpus 1)")


def slow_arithmetic(param_dtype: str, device: str) -> str | None:
    """Warn of a recipe for GPUs on a processor without such instructions: days in place of minutes."""
    times = 1.0 if param_dtype == "fp32" else machine.slowdown(DTYPES[param_dtype], device)
    if times <= SLOW:
        return None
    return (
        f"products in {param_dtype} take {times:.0f} times as long as in fp32 on this {device}; "
        "set compute_precision.param_dtype=fp32"
    )


@functools.cache  # once in a process
def _warn_if_slow(param_dtype: str, device: str) -> None:
    if (text := slow_arithmetic(param_dtype, device)) is not None:
        log.warning("event=warning what=%r", text)


def _fresh(recipe: Recipe) -> SSLMetaArch:
    with rng.torch_stream(recipe.seed, "init", "pretrain"):
        return SSLMetaArch(recipe)


class Pretrainer:
    """Student, teacher and optimizer of one site, moved forward by global steps of one stage.

    Args:
        recipe: the run.
        pixels: gives uint8 (n, H, W) for positions 0 … n_images − 1 of the training images.
        n_images: how many there are.
        roster_index: the site's place among the sites sorted by name; names its random streams.
        step: a global step of the stage to be trained.
        device: where the arithmetic is done; what is given and returned is on the CPU.

    With several ranks (`ranks.together`) all of them make one and call the same methods: each takes its part
    of the batch, and what comes out is that of the joint batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        pixels: Callable[[np.ndarray], np.ndarray],
        n_images: int,
        roster_index: int,
        *,
        step: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if n_images < 1:
            raise DataError("no training image: pretraining needs at least one")
        check_gpus(recipe, group.size())
        self.run_recipe, self.stage = recipe, curriculum.index_at(recipe, step)
        self.recipe = recipe = curriculum.at(recipe, step)[0]
        self.pixels, self.n_images, self.roster_index = pixels, n_images, roster_index
        self.device = torch.device(device)
        if group.first():
            _warn_if_slow(recipe.compute_precision.param_dtype, self.device.type)
        self.model = _fresh(recipe).to(self.device)
        if recipe.train.compile:
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile()
        parts = (self.model.student, self.model.teacher)
        self.joint = group.spread(self.model, parts, recipe.compute_precision.sharding_strategy)
        self.optimizer = optimizer.build(self.model.student, ARCHS[recipe.student.arch][1], recipe.optim)
        precision = recipe.compute_precision
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=precision.param_dtype == "fp16" and precision.grad_scaler
        )

    def load_global(self, tensors: dict[str, Tensor]) -> None:
        """Start a round from the coordinator's weights; a teacher or moments that it does not send stay.

        Raises: CheckpointError naming what is missing, unexpected or of another shape.
        """
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith(MOMENTS)}
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

    def global_tensors(self, *, teacher: bool, copy: bool = True) -> dict[str, Tensor]:
        """Copies of the tensors that travel; on the first rank, nothing on the others.

        Args:
            teacher: whether it does.
            copy: or, of what is to train no more, the tensors themselves.
        """
        state = self._state_dict()
        return group.collected(((name, state[name]) for name in self.global_names(teacher=teacher)), copy=copy)

    def _state_dict(self) -> dict[str, Tensor]:
        group.gathered_no_more(self.model)
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def moments(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The optimizer's moments, where they travel; `copy` as of `global_tensors`."""
        return optimizer.moments(self.optimizer, self.model.student, copy=copy)

    def state(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Everything that the next round stands on: model, teacher, centres, queue, optimizer moments, loss scale.

        The same whatever the number of ranks.  All ranks take part; the first gets it, the others nothing.  `copy` as
        of `global_tensors`.
        """
        named = ((f"model.{name}", tensor) for name, tensor in self._state_dict().items())
        queue = {QUEUE: self.model.queue.to("cpu", copy=copy)} if len(self.model.queue) else {}
        return group.collected(named, copy=copy) | queue | self.moments(copy=copy) | self._scale()

    def _scale(self) -> dict[str, Tensor]:
        """The loss scale of fp16 and the steps since it last changed; nothing without a scaler."""
        if not self.scaler.is_enabled() or not group.first():
            return {}
        values = self.scaler.state_dict()
        return {"scaler.scale": torch.tensor([values["scale"], values["_growth_tracker"]], dtype=torch.float64)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises: CheckpointError; nothing was changed then.
        """
        moments = {name: tensor for name, tensor in tensors.items() if name.startswith(MOMENTS)}
        states = optimizer.checked_moments(self.model.student, moments)
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        scale = tensors.get("scaler.scale")
        if (scale is not None) != self.scaler.is_enabled() or (scale is not None and scale.shape != (2,)):
            raise CheckpointError("state does not fit: its loss scale is not that of compute_precision")
        queue = tensors.get(QUEUE, self.model.queue[:0])
        if queue.shape[1:] != self.model.queue.shape[1:] or not torch.isfinite(queue).all():
            raise CheckpointError(f"state does not fit: its {QUEUE} is not rows of {self.model.queue.shape[1]} numbers")
        load_tensors(self.model, model, list(self.model.state_dict()))
        self.model.queue = queue.to(self.model.queue)
        optimizer.set_moments(self.optimizer, states)
        if scale is not None:
            self.scaler.load_state_dict(
                self.scaler.state_dict() | {"scale": float(scale[0]), "_growth_tracker": int(scale[1])}
            )

    def run(
        self,
        first_step: int,
        steps: int,
        batch_size: int,
        progress: Progress | None = None,
        probe: Probe | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[dict[str, Any]]:
        """Take global steps first_step … first_step + steps − 1.

        Args:
            first_step: the first.
            steps: how many.
            batch_size: images a step, of all ranks together.
            progress: told (done, of how many) after each step.
            probe: asked after each step with the teacher's backbone and the step, by every rank, since the weights may
                be dealt out to all; what it says joins the row.  It draws nothing at random and leaves the backbone as
                it is: training takes the same course without it.
            stop: asked after each step whether to take no further one; what one rank says holds for all.

        Returns:
            One row a step: step, images of the joint batch that it was taken on, loss and its parts (means over the
            ranks), log_k, and the figures of health.py (of the joint batch), and what the probe says.

        Raises:
            DivergedError naming the step and its images when loss or gradient is not finite; nothing was updated by it.
            ConfigError if the memory does not suffice, naming what to lower.
        """
        recipe = self.recipe
        stages = {curriculum.index_at(self.run_recipe, step) for step in (first_step, first_step + steps - 1)}
        if stages != {self.stage}:
            raise ValueError(f"steps {first_step} … {first_step + steps - 1} are not all in stage {self.stage}")
        batches = Batches(
            recipe,
            self.pixels,
            self.n_images,
            batch_size,
            self.roster_index,
            rank=group.rank(),
            world_size=group.size(),
            device=self.device,
        )
        rows = []
        self.model.train()
        own = (group.rank(),) if group.rank() else ()  # drop path is each rank's own
        for step, batch in batches.steps(first_step, first_step + steps - 1):
            with (
                self._naming(step, batches.positions(step)),
                rng.torch_stream(recipe.seed, "pretrain", step, self.roster_index, "torch", *own),
            ):
                parts = self.step(batch, step)
            images = len(batch.global_crops) // 2 * group.size()
            rows.append({"step": step, "images": images, **parts, "log_k": math.log(recipe.dino.head_n_prototypes)})
            if probe is not None:
                rows[-1] |= probe(self.model.teacher["backbone"], step)
            if progress is not None:
                progress(step - first_step + 1, steps)
            if stop is not None and group.any_of(stop()):
                break
        self._check_finite(step, batches)
        return rows

    def _check_finite(self, step: int, batches: Batches) -> None:
        """Check that the last step left weights to go on from; a step before it would have shown in the loss.

        By the sums of the student's weights, which take a tenth of the time of asking each; the teacher follows it.
        """
        sums = torch.stack([group.local(p).detach().sum() for p in self.model.student.parameters()])
        if group.any_of(not bool(torch.isfinite(sums).all())):
            error = DivergedError(f"pretraining step {step}: it left weights that are not finite; lower optim.lr")
            error.step, error.places, error.when = step, batches.positions(step).tolist(), "after"
            raise error

    @contextlib.contextmanager
    def _naming(self, step: int, places: np.ndarray) -> Iterator[None]:
        """Give an error the images of its step, and one of memory the settings that it hangs on."""
        try:
            yield
        except DivergedError as error:
            error.step, error.places = step, places.tolist()
            raise
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            crops = self.recipe.crops
            raise ConfigError(
                f"pretraining step {step}: out of memory on {self.device} with {len(places)} images a step, 2 crops of "
                f"{crops.global_crops_size} and {crops.local_crops_number} of {crops.local_crops_size} px each; lower "
                "train.batch_size or train.pooled_batch_size, set train.checkpointing=true or "
                "compute_precision.param_dtype=bf16, or give more GPUs (--gpus)"
            ) from error

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step and the teacher's EMA; returns the loss and its parts.

        In fp16 a step whose gradient overflowed changes nothing but the loss scale.
        """
        values = schedules.at(self.run_recipe, step)
        optimizer.apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        dtype = DTYPES[self.recipe.compute_precision.param_dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss, parts = self.joint(batch, values.teacher_temp)
        told = {"loss": loss, **parts}
        shown = dict(zip(told, group.average(torch.stack([x.float() for x in told.values()])).tolist(), strict=True))
        if not math.isfinite(shown["loss"]):  # on all ranks then
            raise DivergedError(
                f"pretraining step {step}: the loss is {shown['loss']}; lower optim.lr or raise teacher.teacher_temp"
            )
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for name in SUBMODULES:
            norm = optimizer.clip(self.model.student[name], self.recipe.optim.clip_grad or math.inf)
            if not torch.isfinite(norm) and not self._rescales():
                raise DivergedError(
                    f"pretraining step {step}: the gradient of the {name} has the norm {norm.item()}; lower optim.lr"
                )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.update_teacher(values.momentum)
        return shown

    def _rescales(self) -> bool:
        """Whether an overflow is the loss scale's, which will be halved, and not the model's."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1
