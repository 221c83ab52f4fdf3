"""The device's crops against OpenCV's, and against values by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chexfound.data.crops import on_device, opencv
from chexfound.data.crops.geometry import CropPlan, draw_multi_crop
from chexfound.recipe.schema import Crops

PX = 96
ALL = {
    "blur": (1.0, 0.1, 0.5), "brightness": 0.4, "contrast": 0.4, "solarize": 0.3, "tone_curve": 1.0, "detail": 1.0,
    "noise": 0.05, "rotation_deg": 20.0,
}  # fmt: skip
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def smooth(count: int) -> np.ndarray:
    """Images with the contrast of an X-ray: waves of some ten pixels, and fine noise."""
    rng = np.random.default_rng(0)
    y, x = np.indices((PX, PX))
    waves = [np.sin(x / rng.uniform(5, 15) + k) + np.cos(y / rng.uniform(5, 15)) for k in range(count)]
    return np.clip(128 + 50 * np.stack(waves) + rng.normal(0, 3, (count, PX, PX)), 0, 255).astype(np.uint8)


def both(images: np.ndarray, plan: CropPlan, device: str) -> tuple[np.ndarray, np.ndarray]:
    found = on_device.render(torch.from_numpy(images).to(device), plan)
    assert found.dtype == torch.uint8
    assert found.device.type == device
    return opencv.render(images, plan).reshape(found.shape), found.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "values", [{}, *({key: value} for key, value in ALL.items()), ALL, {**ALL, "look_per_image": True}]
)
def test_both_renderers_agree(values: dict[str, Any], device: str):
    """Measured on X-rays: 0.02 grey levels in the mean with everything on (OpenCV 5)."""
    images = smooth(4)
    config = Crops(**{"global_crops_size": 64, "local_crops_size": 32, "local_crops_scale": (0.1, 0.5), **values})
    for plan in draw_multi_crop(config, 4, PX, PX, np.random.default_rng(1)):
        expected, found = both(images, plan, device)
        away = np.abs(expected.astype(int) - found)
        assert away.mean() < 0.25
        assert (away > 3).mean() < 1e-3
        assert expected.std() > 20


@pytest.mark.parametrize("device", DEVICES)
def test_where_nothing_is_resampled_they_are_equal(device: str):
    images = np.random.default_rng(0).integers(0, 256, (3, PX, PX), dtype=np.uint8)
    config = Crops(
        global_crops_size=PX, global_crops_scale=(1.0, 1.0), rotation_deg=0.0, tone_curve=1.0, solarize=0.5,
        local_crops_number=0,
    )  # fmt: skip
    expected, found = both(images, draw_multi_crop(config, 3, PX, PX, np.random.default_rng(0))[0], device)
    assert np.array_equal(expected, found)
    plain = {"global_crops_size": PX, "global_crops_scale": (1.0, 1.0), "rotation_deg": 0.0, "jitter": 0.0}
    for flip, result in ((0.0, images), (1.0, images[:, :, ::-1])):
        plan = draw_multi_crop(Crops(**plain, horizontal_flip=flip), 3, PX, PX, np.random.default_rng(0))[0]
        assert np.array_equal(both(images, plan, device)[1], np.concatenate([result, result]))


@pytest.mark.parametrize("device", DEVICES)
def test_images_that_are_not_square_and_a_crop_smaller_than_the_blur(device: str):
    images = smooth(2)[:, :40].copy()
    config = Crops(global_crops_size=48, local_crops_size=4, blur=1.0)
    for plan in draw_multi_crop(config, 2, 40, PX, np.random.default_rng(0)):
        expected, found = both(images, plan, device)
        assert np.abs(expected.astype(int) - found).mean() < 0.25


@pytest.mark.parametrize("device", DEVICES)
def test_no_local_crops(device: str):
    config = Crops(**{**ALL, "local_crops_number": 0, "local_crops_size": 16})
    plan = draw_multi_crop(config, 2, PX, PX, np.random.default_rng(0))[1]
    images = torch.zeros(2, PX, PX, dtype=torch.uint8, device=device)
    assert on_device.render(images, plan).shape == (0, 16, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_a_blurred_edge_has_the_variance_of_the_kernel(device: str):
    edge = np.zeros((1, PX, PX), np.uint8)
    edge[..., PX // 2 :] = 255
    for sigma in (0.5, 1.0, 2.0):
        blurred = on_device._blurred(torch.from_numpy(edge).float().to(device), np.array([sigma]))
        weights, places = np.diff(blurred[0, 40].cpu().numpy()) / 255, np.arange(PX - 1)
        variance = (weights * places**2).sum() - (weights * places).sum() ** 2
        kernel = on_device.kernels(np.array([sigma]))[0]
        assert variance == pytest.approx((kernel * (np.arange(len(kernel)) - len(kernel) // 2) ** 2).sum(), rel=0.03)


def test_the_same_plan_gives_the_same_bits():
    images = torch.from_numpy(smooth(3))
    plan = draw_multi_crop(Crops(**ALL), 3, PX, PX, np.random.default_rng(0))[0]
    whole = on_device.render(images, plan)
    assert torch.equal(whole, on_device.render(images, plan))
    part = on_device.render(images[1:], plan.part(1, 3))
    assert torch.equal(whole.reshape(2, 3, 96, 96)[:, 1:].flatten(0, 1), part)
