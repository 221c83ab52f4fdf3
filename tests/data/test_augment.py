"""Crop geometry on a gradient image, whose value at (x, y) is 4x + y/2, so that a crop tells where it came from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexfound.data import augment
from chexfound.schema import Crops

PLAIN = {"horizontal_flip": 0.0, "rotation_deg": 0.0, "jitter": 0.0, "blur": 0.0}
PX = 60
ACROSS = np.tile(4 * np.arange(PX), (PX, 1)).astype(np.uint8)  # 4 grey levels a pixel to the right
DOWN = ACROSS.T.copy()


def crops(**values: object) -> Crops:
    return Crops(**{**PLAIN, **values})


class Given:
    """A generator whose `uniform` gives chosen fractions of its range, in turn."""

    def __init__(self, *fractions: float) -> None:
        self.fractions = iter(fractions)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self.fractions)


def test_the_whole_image_comes_back_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (PX, PX), dtype=np.uint8)
    for seed in range(10):
        result = augment.crop(image, PX, (1.0, 1.0), crops(), np.random.default_rng(seed))
        assert np.array_equal(result, image)


def test_a_flip_mirrors():
    image = np.random.default_rng(0).integers(0, 256, (PX, PX), dtype=np.uint8)
    result = augment.crop(image, PX, (1.0, 1.0), crops(horizontal_flip=1.0), np.random.default_rng(1))
    assert np.array_equal(result, image[:, ::-1])


def test_a_quarter_turn_by_hand():
    """All the way to + 90°: the result's right is the image's down, its down the image's left."""
    generator = Given(0.5, 0.5, 0.5, 0.5, 1.0, 0.5)  # area, aspect, x, y, angle, flip
    result = augment.crop(ACROSS, PX, (1.0, 1.0), crops(rotation_deg=90.0), generator)
    assert np.array_equal(result, np.rot90(ACROSS, 1))


@pytest.mark.parametrize(("at", "start"), [(0.0, 0), (0.5, 15), (1.0, 30)])
def test_a_quarter_of_the_area_is_half_of_each_side(at, start):
    """Area 1/4 and aspect 1 (the middle of its log range): 30 × 30 pixels from `start`, magnified to 60."""
    for image, place in ((ACROSS, (at, 0.3)), (DOWN, (0.3, at))):
        result = augment.crop(image, PX, (0.25, 0.25), crops(), Given(0.5, 0.5, *place, 0.5, 0.5))
        values = (result if image is ACROSS else result.T)[PX // 2]
        # Pixel centre i + 0.5 of 60 lies at start + (i + 0.5) / 2 of the image, whose pixel x holds 4 (x + 0.5) − 2.
        expected = 4 * (start + (np.arange(PX) + 0.5) / 2) - 2
        inside = slice(1, -1)  # the outermost half pixels repeat the border
        assert np.abs(values[inside] - expected[inside]).max() <= 1


def test_an_aspect_of_four_thirds_by_hand():
    """Area 3/16 of 60² = 675 = 30 × 22.5; flipped, it starts at the right edge of the crop."""
    result = augment.crop(ACROSS, 30, (0.1875, 0.1875), crops(horizontal_flip=1.0), Given(0.5, 1.0, 1.0, 0.0, 0.5, 0.5))
    assert np.abs(result[0].astype(int) - (4 * np.arange(59, 29, -1))).max() <= 1
    down = augment.crop(DOWN, 30, (0.1875, 0.1875), crops(), Given(0.5, 1.0, 1.0, 0.0, 0.5, 0.5))
    expected = 4 * ((np.arange(30) + 0.5) * 22.5 / 30) - 2
    assert np.abs(down[1:, 0] - expected[1:]).max() <= 1


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_the_share_of_the_area_is_in_its_range(one, other, seed):
    scale = (min(one, other), max(one, other))
    matrix = {}

    def warp(image: np.ndarray, affine: np.ndarray, *_: object, **__: object) -> np.ndarray:
        matrix["affine"] = affine
        return image

    config = crops(rotation_deg=30.0, horizontal_flip=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment.cv2, "warpAffine", warp)
        augment.crop(ACROSS, 20, scale, config, np.random.default_rng(seed))
    affine = matrix["affine"]
    share = abs(np.linalg.det(affine[:, :2])) * 20**2 / PX**2
    assert max(scale[0], 1 / PX**2) - 1e-9 <= share <= max(scale[1], 1 / PX**2) + 1e-9
    width, height = (np.linalg.norm(affine[:, axis]) * 20 for axis in (0, 1))
    assert max(width, height) <= PX + 1e-9
    assert 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9
    middle = affine @ (9.5, 9.5, 1.0)  # of the crop, in the image: far enough inside for an unrotated crop
    assert width / 2 - 0.5 - 1e-9 <= middle[0] <= PX - width / 2 - 0.5 + 1e-9
    assert height / 2 - 0.5 - 1e-9 <= middle[1] <= PX - height / 2 - 0.5 + 1e-9


def test_an_image_that_is_not_square_is_covered_too():
    image = np.tile(np.arange(200, dtype=np.uint8), (20, 1))
    result = augment.crop(image, 40, (1.0, 1.0), crops(), np.random.default_rng(0))
    assert result[0, 0] <= 3
    assert result[0, -1] >= 196


def test_jitter_is_a_gamma_of_two_jitters_in_log_units():
    image = np.full((8, 8), 64, np.uint8)
    darkest = augment.crop(image, 8, (1.0, 1.0), crops(jitter=0.1), Given(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0))
    assert darkest[0, 0] == round(255 * (64 / 255) ** math.exp(0.2))
    values = [
        augment.crop(image, 8, (1.0, 1.0), crops(jitter=0.1), np.random.default_rng(seed))[0, 0] for seed in range(50)
    ]
    assert min(values) < 60 < 68 < max(values)
    for end in (0, 255):
        flat = np.full((8, 8), end, np.uint8)
        assert (augment.crop(flat, 8, (1.0, 1.0), crops(jitter=0.1), np.random.default_rng(0)) == end).all()


def test_blur_smooths_as_often_as_it_says():
    image = (np.indices((PX, PX)).sum(0) % 2 * 255).astype(np.uint8)

    def blurred(probability: float) -> float:
        config = crops(blur=probability)
        results = [augment.crop(image, PX, (1.0, 1.0), config, np.random.default_rng(seed)) for seed in range(60)]
        return float(np.mean([not np.array_equal(result, image) for result in results]))

    assert blurred(0.0) == 0
    assert blurred(1.0) > 0.8  # a sigma below 0.2 leaves the image as it is
    assert 0.05 < blurred(0.2) < 0.4


def test_multi_crop_goes_view_by_view_and_repeats():
    images = np.stack([np.full((PX, PX), value, np.uint8) for value in (10, 120, 240)])
    config = crops(global_crops_size=32, local_crops_size=16, local_crops_number=3)
    global_crops, local_crops = augment.multi_crop(images, config, np.random.default_rng(5))
    assert global_crops.shape == (6, 32, 32)
    assert local_crops.shape == (9, 16, 16)
    assert global_crops[:, 0, 0].tolist() == [10, 120, 240] * 2
    assert local_crops[:, 0, 0].tolist() == [10, 120, 240] * 3
    textured = np.random.default_rng(0).integers(0, 256, (3, PX, PX), dtype=np.uint8)
    first, again, other = (augment.multi_crop(textured, config, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0][:3], first[0][3:])  # two different views
    none = augment.multi_crop(images, crops(local_crops_number=0), np.random.default_rng(0))[1]
    assert none.shape == (0, 48, 48)


def test_gentle_views_keep_size_and_order():
    images = np.stack([np.full((PX, PX), value, np.uint8) for value in (10, 240)])
    views = augment.gentle(images, Crops(), np.random.default_rng(0))
    assert views.shape == images.shape
    assert views.dtype == np.uint8
    assert views[0].max() < views[1].min()
