"""Features of the training images by a frozen backbone, computed once and kept on the site's disk, where they stay.

Shapes: V views (the image itself first), N images, n last blocks, P patches, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chexfound import rng
from chexfound.data.crops import opencv
from chexfound.durable.files import replace_file
from chexfound.model.vit import VisionTransformer
from chexfound.recipe.schema import Recipe

CHUNK = 64  # images a forward pass


@dataclass(frozen=True)
class Features:
    """Tokens of the last blocks, memory-mapped: patches (V, N, P, n·D), cls (V, N, n·D), float32."""

    patches: np.ndarray
    cls: np.ndarray

    def rows(self, views: np.ndarray, images: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        """Chosen (view, image) pairs as a head takes them."""
        return [torch.from_numpy(self.patches[views, images])], [torch.from_numpy(self.cls[views, images])]


@torch.inference_mode()
def tokens(backbone: VisionTransformer, images: np.ndarray, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Last blocks' patch tokens (N, P, n·D) and CLS (N, n·D) of uint8 images (N, H, W)."""
    backbone.eval()
    device = backbone.cls_token.device
    patches, cls = [], []
    for start in range(0, len(images), CHUNK):
        layers = backbone.get_intermediate_layers(
            torch.from_numpy(images[start : start + CHUNK]).to(device), n_blocks, return_class_token=True
        )
        patches.append(torch.cat([layer[0] for layer in layers], dim=-1).cpu().numpy())
        cls.append(torch.cat([layer[1] for layer in layers], dim=-1).cpu().numpy())
    return np.concatenate(patches), np.concatenate(cls)


def extract(
    recipe: Recipe,
    backbone: VisionTransformer,
    pixels: Callable[[np.ndarray], np.ndarray],
    n_images: int,
    roster_index: int,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Compute and keep the features of a site's labelled training images, in all views."""
    views, n_blocks = 1 + recipe.adapt.views, recipe.adapt.n_last_blocks
    width = n_blocks * backbone.embed_dim
    n_patches = (recipe.image_px // recipe.student.patch_size) ** 2
    with replace_file(folder / "patches.npy") as patch_file, replace_file(folder / "cls.npy") as cls_file:
        patches = np.lib.format.open_memmap(patch_file, "w+", np.float32, (views, n_images, n_patches, width))
        cls = np.lib.format.open_memmap(cls_file, "w+", np.float32, (views, n_images, width))
        _reserve(patch_file)
        _reserve(cls_file)
        done = 0
        for view in range(views):
            generator = rng.numpy_generator(recipe.seed, "features", view, roster_index)
            for start in range(0, n_images, CHUNK):
                images = pixels(np.arange(start, min(start + CHUNK, n_images)))
                if view:
                    images = opencv.gentle(images, recipe.crops, generator)
                here = slice(start, start + len(images))
                patches[view, here], cls[view, here] = tokens(backbone, images, n_blocks)
                done += len(images)
                if progress is not None:
                    progress(done, views * n_images)
        patches.flush()
        cls.flush()
    return load(folder)


def _reserve(path: Path) -> None:
    """Have the system allot every block of a sparse file, or say now that the disk is full.

    Otherwise a full disk ends the process by a signal at the first page that has no room.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def load(folder: Path) -> Features:
    """The features that `extract` left in a folder."""
    return Features(np.load(folder / "patches.npy", mmap_mode="r"), np.load(folder / "cls.npy", mmap_mode="r"))
