"""The crops of a plan in a few large operations on any device, from uint8 images that were moved there once.

The same arithmetic as `augment.py`, step by step, each rounded to whole grey levels.  What rounds the
other way differs by a grey level or two: 0.02 in the mean on X-rays with all that there is switched
on (OpenCV 5).  Where nothing is resampled or blurred the two are equal.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from chexfound.data.crops import geometry
from chexfound.data.crops.geometry import CropPlan


@torch.no_grad()
def render(images: Tensor, plan: CropPlan) -> Tensor:
    """Cut the crops of a plan out of its images, on the images' device.

    Args:
        images: uint8 (B, H, W).
        plan: of as many images.

    Returns:
        uint8 (V·B, s, s), view by view.
    """
    device = images.device
    result = torch.empty(plan.shape, dtype=torch.uint8, device=device)
    sources = images[:, None].float()
    maps = _moved(_normalised(plan.affine, *images.shape[1:]), device)
    for view in range(plan.shape[0]):  # one at a time: the least memory
        crop = _warp(sources, maps[view], plan.size)
        if plan.tables is not None:
            crop = _looked_up(crop, _moved(plan.tables[view], device))
        if plan.detail is not None:
            sigma, gain = plan.detail[view].T.astype(np.float32)
            soft = _blurred(crop, sigma)
            crop = _whole(soft + _moved(gain, device)[:, None, None] * (crop - soft))
        crop = _blurred_where(crop, plan.blur[view])
        if plan.noise is not None and plan.noise_from is not None:
            crop = _noisy(crop, plan.noise[view], plan.noise_from[view])
        result[view] = crop
    return result.flatten(0, 1)


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the copy is queued there and not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _whole(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255)


def _normalised(affine: np.ndarray, height: int, width: int) -> np.ndarray:
    """The maps to places that `grid_sample` counts from −1 to 1 over the whole image: float32 (V, B, 2, 3)."""
    sides = np.array([width, height])[:, None]
    maps = affine * 2 / sides
    maps[..., 2:] += 1 / sides - 1
    single: np.ndarray = maps.astype(np.float32)
    return single


def _warp(sources: Tensor, maps: Tensor, size: int) -> Tensor:
    """Bilinear, the border repeated: float (B, 1, H, W) and maps (B, 2, 3) to whole grey levels (B, s, s)."""
    steps = torch.arange(size, dtype=torch.float32, device=sources.device)
    x, y = steps[None, None, :, None], steps[None, :, None, None]
    columns = maps[:, None, None]  # (B, 1, 1, 2, 3), each below broadcast to (B, s, s, 2)
    grid = columns[..., 0] * x + columns[..., 1] * y + columns[..., 2]
    sampled = F.grid_sample(sources, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _whole(sampled[:, 0])


def _looked_up(crop: Tensor, tables: Tensor) -> Tensor:
    """Replace each grey value by its entry in its image's table: (B, s, s) and uint8 (B, 256)."""
    return tables.float().gather(1, crop.long().flatten(1)).view_as(crop)


def _blurred_where(crop: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur the crops whose sigma is not 0; which those are is known here, so the device is not waited for."""
    which = np.flatnonzero(sigma)
    if not len(which):
        return crop
    if len(which) == len(sigma):
        return _blurred(crop, sigma)
    places = _moved(which, crop.device)
    return crop.index_copy(0, places, _blurred(crop[places], sigma[which]))


def _blurred(crop: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur with a sigma for each image, to whole grey levels; the border is mirrored."""
    weights = kernels(sigma)
    taps, size = weights.shape[1], crop.shape[-1]
    mirrored = _moved(np.pad(np.arange(size), taps // 2, mode="reflect"), crop.device)
    columns = _moved(weights.T.astype(np.float32), crop.device)[:, :, None, None]  # (taps, B, 1, 1)
    for axis in (-1, -2):
        wide = crop.index_select(axis, mirrored)
        crop = sum(columns[tap] * wide.narrow(axis, tap, size) for tap in range(taps))  # type: ignore[assignment]
    return _whole(crop)


def kernels(sigma: np.ndarray) -> np.ndarray:
    """Sampled Gaussians (B, taps), each cut off where OpenCV does for 8-bit images: at 3 sigma, rounded up."""
    radius = (np.rint(6 * sigma + 1).astype(np.int64) | 1) // 2
    steps = np.arange(-radius.max(), radius.max() + 1)
    weights = np.exp(-(steps**2) / (2 * np.asarray(sigma, np.float64)[:, None] ** 2))
    weights[np.abs(steps) > radius[:, None]] = 0
    normalised: np.ndarray = weights / weights.sum(1, keepdims=True)
    return normalised


def _noisy(crop: Tensor, deviation: np.ndarray, corners: np.ndarray) -> Tensor:
    size, device = crop.shape[-1], crop.device
    places = _moved(corners[:, :, None] + np.arange(size), device)  # (B, 2, s)
    noise = _noise_field(size, device)[places[:, 0, :, None], places[:, 1, None, :]]
    return _whole(crop + _moved(deviation, device)[:, None, None] * noise)


@functools.lru_cache(maxsize=4)
def _noise_field(size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(geometry.noise_field(size).copy()).to(device)
