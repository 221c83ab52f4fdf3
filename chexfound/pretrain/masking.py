"""Block masks for iBOT (Bao et al. 2022, BEiT; as used in iBOT and DINOv2)."""

from __future__ import annotations

import math

import numpy as np


def block_mask(rows: int, columns: int, n_masked: int, rng: np.random.Generator) -> np.ndarray:
    """A bool mask (rows, columns) of at most `n_masked` True cells, made of rectangles.

    Rectangles are drawn with an area of at least 4 cells (less when fewer are wanted) and an aspect
    ratio of 0.3 to 1/0.3, then rounded to whole cells; when none fits any more, fewer cells than
    asked are returned (1 mask in 100 on the grids of the paper, and then a few).

    The only bound of one rectangle is what is still missing.  DINOv2 has another: half of the grid, computed
    left to right as `0.5 * px // 16 * px // 16`, which is half on even grids but 210 of 441 cells at 336 px
    where half is 220.  It bounds a rectangle, not the mask, and nothing is ever asked beyond half of the
    grid by the usual ratios; so leaving it out changes one draw in hundreds, at 336 px only.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    low, high = math.log(0.3), math.log(1 / 0.3)
    count = 0
    while count < n_masked:
        added = 0
        for _ in range(10):
            area = rng.uniform(min(4, n_masked - count), n_masked - count)
            aspect = math.exp(rng.uniform(low, high))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= n_masked - count:
                block[...] = True
                added = new
                break
        if not added:
            break
        count += added
    return mask


def batch_masks(
    n_images: int, grid: int, probability: float, ratio: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Masks (n_images, grid²) of one batch of global crops.

    A share `probability` of the images is masked, the i-th of them with a ratio drawn from the i-th
    part of the range (so that a batch always covers the range); which images those are is random.
    """
    n_masked_images = int(n_images * probability)
    bounds = np.linspace(*ratio, n_masked_images + 1)
    masks = np.zeros((n_images, grid * grid), dtype=bool)
    for row in range(n_masked_images):
        share = rng.uniform(bounds[row], bounds[row + 1])
        masks[row] = block_mask(grid, grid, int(grid * grid * share), rng).ravel()
    return masks[rng.permutation(n_images)]
