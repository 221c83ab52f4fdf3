"""Multi-crop and photometry on grey uint8 by OpenCV: one affine warp and one table a crop.

What is done to which crop is drawn in `geometry.py`; `on_device.py` renders the same plans on a device.
OpenCV lets go of the interpreter while it works, so threads may render parts of a batch.
"""

from __future__ import annotations

import cv2
import numpy as np

from chexfound.data.crops import geometry
from chexfound.data.crops.geometry import CropPlan
from chexfound.recipe.schema import Crops

cv2.setNumThreads(1)  # many small warps: threads cost more than they give, and sites share the cores

_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def render(images: np.ndarray, plan: CropPlan, out: np.ndarray | None = None) -> np.ndarray:
    """Cut the crops of a plan out of its images.

    Args:
        images: uint8 (B, H, W).
        plan: of as many images.
        out: uint8 (V, B, s, s) to write into; each crop must be contiguous.

    Returns:
        uint8 (V, B, s, s).
    """
    result = np.empty(plan.shape, np.uint8) if out is None else out
    for view, image in np.ndindex(plan.shape[:2]):
        _render(images[image], plan, view, image, result[view, image])
    return result


def _render(image: np.ndarray, plan: CropPlan, view: int, place: int, crop: np.ndarray) -> None:
    """Write one crop; each step works in place."""
    size = (plan.size, plan.size)
    cv2.warpAffine(image, plan.affine[view, place], size, crop, flags=_WARP, borderMode=cv2.BORDER_REPLICATE)
    if plan.tables is not None:
        cv2.LUT(crop, plan.tables[view, place], crop)
    if plan.detail is not None:
        sigma, gain = plan.detail[view, place]
        cv2.addWeighted(crop, gain, cv2.GaussianBlur(crop, (0, 0), sigmaX=sigma), 1 - gain, 0, crop)
    if sigma := plan.blur[view, place]:
        cv2.GaussianBlur(crop, (0, 0), sigmaX=sigma, dst=crop)
    if plan.noise is not None and plan.noise_from is not None:
        top, left = plan.noise_from[view, place]
        noise = geometry.noise_field(plan.size)[top : top + plan.size, left : left + plan.size]
        crop[...] = np.rint(crop + plan.noise[view, place] * noise).clip(0, 255)


def multi_crop(images: np.ndarray, config: Crops, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Global and local crops of a batch: uint8 (B, H, W) to (2·B, g, g) and (L·B, l, l), view by view."""
    n_images, height, width = images.shape
    plans = geometry.draw_multi_crop(config, n_images, height, width, rng)
    global_crops, local_crops = (render(images, plan).reshape(-1, plan.size, plan.size) for plan in plans)
    return global_crops, local_crops


def gentle(images: np.ndarray, config: Crops, rng: np.random.Generator) -> np.ndarray:
    """One view of each image for training a head, at the image's own size: uint8 (B, H, H)."""
    n_images, height, width = images.shape
    views: np.ndarray = render(images, geometry.draw_gentle(config, n_images, height, width, rng))[0]
    return views
