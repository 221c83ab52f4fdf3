"""Multi-crop and photometry on grey uint8, one affine warp a crop (OpenCV).

Adapted to X-rays: no colour, no solarisation; gamma instead of brightness and contrast, which the
z-score at the model's input would undo.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from chexfound.schema import Crops

cv2.setNumThreads(1)  # many small warps: threads cost more than they give, and sites share the cores


def crop(
    image: np.ndarray, size: int, scale: tuple[float, float], config: Crops, rng: np.random.Generator
) -> np.ndarray:
    """A random resized crop (Szegedy et al. 2015), rotated, flipped and with another gamma.

    Args:
        image: uint8 (H, W).
        size: side of the result in pixels.
        scale: range of the crop's share of the image's area; its aspect ratio is 3/4 to 4/3 as far
            as such a crop fits into the image.
        config: rotation, flip, gamma and blur.
        rng: the stream that all is drawn from.
    """
    height, width = image.shape
    area = max(rng.uniform(*scale) * height * width, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    aspect = min(max(aspect, area / height**2), width**2 / area)  # what fits, so that the area is as drawn
    crop_w, crop_h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    center_x = crop_w / 2 + rng.uniform() * (width - crop_w)
    center_y = crop_h / 2 + rng.uniform() * (height - crop_h)
    angle = math.radians(rng.uniform(-config.rotation_deg, config.rotation_deg))
    flip = -1.0 if rng.uniform() < config.horizontal_flip else 1.0
    # The inverse map: a pixel of the result to its place in the image, pixel centres at + 0.5.
    scale_x, scale_y = flip * crop_w / size, crop_h / size
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos * scale_x, -sin * scale_y, 0.0], [sin * scale_x, cos * scale_y, 0.0]])
    middle = np.array([size / 2 - 0.5, size / 2 - 0.5])
    matrix[:, 2] = (center_x - 0.5, center_y - 0.5) - matrix[:, :2] @ middle
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    result = cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if config.jitter:
        gamma = math.exp(rng.uniform(-config.jitter, config.jitter) * 2)
        table = (255 * (np.arange(256) / 255) ** gamma + 0.5).astype(np.uint8)
        result = cv2.LUT(result, table)
    if config.blur and rng.uniform() < config.blur:
        result = cv2.GaussianBlur(result, (0, 0), sigmaX=rng.uniform(0.1, 2.0))
    return result


def multi_crop(images: np.ndarray, config: Crops, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Global and local crops of a batch: uint8 (B, H, W) to (2·B, g, g) and (L·B, l, l), view by view."""
    groups = []
    for number, size, scale in (
        (2, config.global_crops_size, config.global_crops_scale),
        (config.local_crops_number, config.local_crops_size, config.local_crops_scale),
    ):
        crops = [crop(image, size, scale, config, rng) for _ in range(number) for image in images]
        groups.append(np.stack(crops) if crops else np.empty((0, size, size), np.uint8))
    return groups[0], groups[1]


def gentle(images: np.ndarray, config: Crops, rng: np.random.Generator) -> np.ndarray:
    """One view of each image for training a head, at the image's own size: uint8 (B, H, W)."""
    return np.stack([crop(image, image.shape[0], (0.75, 1.0), config, rng) for image in images])
