"""A step's batch: drawn from the step's own stream, rendered ahead by threads or on the device.

Shapes: B images of the joint batch (of all GPUs of a site), b of one rank, V views.  What is drawn depends
on (seed, step, roster index) alone: not on who renders it, nor on how many threads or ranks there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from chexfound import rng
from chexfound.data.crops import geometry, opencv
from chexfound.data.crops import on_device as augment_torch
from chexfound.data.crops.geometry import CropPlan
from chexfound.data.crops.sampler import EndlessSampler
from chexfound.errors import ChexfoundError, ConfigError, DataError
from chexfound.pretrain import masking
from chexfound.pretrain.meta_arch import Batch
from chexfound.recipe.schema import Recipe

Pixels = Callable[[np.ndarray], np.ndarray]
AHEAD = 2  # batches in the making beside the one that is trained on


def draw(
    recipe: Recipe, n_images: int, height: int, width: int, step: int, roster_index: int
) -> tuple[list[CropPlan], np.ndarray]:
    """Give what is random in a step: the plans of global and local crops, and the masks, bool (2·B, P)."""
    generator = rng.numpy_generator(recipe.seed, "pretrain", step, roster_index, "augment")
    plans = geometry.draw_multi_crop(recipe.crops, n_images, height, width, generator)
    masks = masking.batch_masks(
        2 * n_images,
        recipe.crops.global_crops_size // recipe.student.patch_size,
        recipe.ibot.mask_sample_probability,
        recipe.ibot.mask_ratio_min_max,
        generator,
    )
    return plans, masks


def make_batch(recipe: Recipe, images: np.ndarray, step: int, roster_index: int) -> Batch:
    """The batch of a step, whole and on the CPU: images uint8 (B, H, W)."""
    n_images, height, width = images.shape
    plans, masks = draw(recipe, n_images, height, width, step, roster_index)
    global_crops, local_crops = (torch.from_numpy(opencv.render(images, plan)).flatten(0, 1) for plan in plans)
    return Batch(global_crops, local_crops, torch.from_numpy(masks))


class Batches:
    """The batches of a site, or of one GPU of it, by step; made ahead by `train.num_workers` threads.

    Args:
        recipe: the run, as the stage of the curriculum has it.
        pixels: gives uint8 (n, H, W) for positions 0 … n_images − 1, always of one shape; called from
            several threads at once.
        n_images: how many training images there are.
        batch_size: B, of all ranks together.
        roster_index: the site's place among the sites sorted by name.
        rank: which GPU of the site this is; it gets images rank · b … (rank + 1) · b − 1 of the joint batch,
            with the crops and masks that the joint batch has.
        world_size: how many GPUs the site trains on.
        device: where the batches shall lie.
        on_device: render there from uint8 images, instead of by OpenCV in the threads; default: on a GPU only.
            The two differ in a few grey levels, so a run keeps to one of them.

    Raises: ConfigError if the batch cannot be divided equally among the ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        pixels: Pixels,
        n_images: int,
        batch_size: int,
        roster_index: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        on_device: bool | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank!r} of {world_size!r}: ranks go from 0 to world size − 1")
        if batch_size % world_size:
            near = -(-batch_size // world_size) * world_size
            raise ConfigError(
                f"a batch of {batch_size} images cannot be divided equally among the {world_size} GPUs of the site; "
                f"choose a multiple of {world_size} (such as {near}) for it, or another number of GPUs"
            )
        self.recipe, self.pixels, self.batch_size, self.roster_index = recipe, pixels, batch_size, roster_index
        self.device = torch.device(device)
        self.on_device = self.device.type != "cpu" if on_device is None else on_device
        self.per_rank = batch_size // world_size
        self.first = rank * self.per_rank  # of the rank's images in the joint batch
        self._sampler = EndlessSampler(n_images, batch_size, recipe.seed, "pretrain", roster_index)

    def positions(self, step: int) -> np.ndarray:
        """Positions 0 … n_images − 1 of the images of a step's joint batch: int64 (B,)."""
        return self._sampler.batch(step)

    def batch(self, step: int) -> Batch:
        """The rank's batch of one step, made here and now."""
        making = _Making(self, step)
        with _told(step):
            making.fill(0, self.per_rank)
            return making.batch()

    def steps(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for global steps first … last, both included, in order.

        At most `AHEAD` further batches are in memory.  The threads end with the loop, however it ends.

        Raises: what went wrong while a batch was made, when its turn comes, with the step named.
        """
        workers = self.recipe.train.num_workers
        if not workers:
            for step in range(first, last + 1):
                yield step, self.batch(step)
            return
        pool = ThreadPoolExecutor(workers, "chexfound-batches")
        queue: deque[tuple[_Making, list[Future[None]]]] = deque()
        try:
            for step in range(first, last + 1):
                for upcoming in range(step + len(queue), min(step + AHEAD, last) + 1):
                    queue.append(self._begin(pool, upcoming, workers))
                making, parts = queue.popleft()
                with _told(step):
                    for part in parts:
                        part.result()
                    batch = making.batch()
                yield step, batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, step: int, workers: int) -> tuple[_Making, list[Future[None]]]:
        """Queue a batch in as many parts as there are threads: so the first is there soonest."""
        making = _Making(self, step)
        bounds = np.linspace(0, self.per_rank, min(workers, self.per_rank) + 1).astype(int).tolist()
        return making, [pool.submit(making.fill, *part) for part in zip(bounds, bounds[1:], strict=False)]


class _Making:
    """A batch while it is made: `fill` from any threads, part by part, then `batch` from the one that trains."""

    def __init__(self, owner: Batches, step: int) -> None:
        self.owner, self.step = owner, step
        own = slice(owner.first, owner.first + owner.per_rank)
        self.positions = owner.positions(step)[own]
        self.plans: list[CropPlan] = []
        self.masks = torch.empty(0, dtype=torch.bool)
        self.buffers: list[Tensor] = []  # of the images, or of the crops by plan
        self._lock = threading.Lock()

    def fill(self, first: int, end: int) -> None:
        """Read images first … end − 1 of the rank's, and render their crops where that is done here."""
        images = self.owner.pixels(self.positions[first:end])
        with self._lock:  # drawn once, by whichever part comes first
            if not self.plans:
                self._draw(images.shape[1], images.shape[2])
        if self.owner.on_device:
            self.buffers[0].numpy()[first:end] = images
            return
        for plan, buffer in zip(self.plans, self.buffers, strict=True):
            opencv.render(images, plan.part(first, end), buffer.numpy()[:, first:end])

    def _draw(self, height: int, width: int) -> None:
        owner, n_images = self.owner, self.owner.batch_size
        plans, masks = draw(owner.recipe, n_images, height, width, self.step, owner.roster_index)
        own = slice(owner.first, owner.first + owner.per_rank)
        own_masks = torch.from_numpy(masks).reshape(2, n_images, -1)[:, own].flatten(0, 1)
        plans = [plan.part(own.start, own.stop) for plan in plans]
        shapes = [(owner.per_rank, height, width)] if owner.on_device else [plan.shape for plan in plans]
        pinned = owner.device.type == "cuda"
        self.buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in shapes]
        self.masks = own_masks.pin_memory() if pinned else own_masks
        self.plans = plans

    def batch(self) -> Batch:
        """Give what was filled, on the device; a copy there is queued and not waited for."""
        device = self.owner.device
        moved = [buffer.to(device, non_blocking=True) for buffer in self.buffers]
        if self.owner.on_device:
            global_crops, local_crops = (augment_torch.render(moved[0], plan) for plan in self.plans)
        else:
            global_crops, local_crops = (crop.flatten(0, 1) for crop in moved)
        return Batch(global_crops, local_crops, self.masks.to(device, non_blocking=True))


@contextlib.contextmanager
def _told(step: int) -> Iterator[None]:
    """Say of which step a batch could not be made."""
    try:
        yield
    except ChexfoundError as error:
        raise type(error)(f"pretraining step {step}: {error}") from error
    except OSError as error:
        raise DataError(f"pretraining step {step}: the images of the batch cannot be read: {error}") from error
    except Exception as error:
        error.add_note(f"while the batch of pretraining step {step} was made")
        raise
