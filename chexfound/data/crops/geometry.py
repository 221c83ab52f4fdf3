"""Random parameters of crops, apart from how they are rendered: those of a whole batch as arrays.

Shapes: V views of B images, each crop s x s pixels.  A plan is a function of the recipe and the stream
alone, so that the same crops can be rendered by OpenCV or on a device, whole or in parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from chexfound import rng as streams
from chexfound.recipe.schema import Crops

BLUR_SIGMA = (0.1, 2.0)  # pixels of the crop, as in DINOv2
DETAIL_SIGMA = (0.5, 2.0)
KNOTS = 5  # of a tone curve
GENTLE_SCALE = (0.75, 1.0)

# A crop's numbers in [0, 1), in the order in which they are drawn.
_AREA, _ASPECT, _ACROSS, _DOWN, _TURN, _FLIP, _GAMMA = range(7)
_GREYS = np.arange(256) / 255


@dataclass(frozen=True)
class CropPlan:
    """The crops of one size: for each view and image where it lies and what is done to its grey values.

    Rendered in the order of the fields, and rounded to whole grey levels after each.
    """

    size: int  # s
    affine: np.ndarray  # float64 (V, B, 2, 3): a pixel (x, y, 1) of the crop to its place in the image
    tables: np.ndarray | None  # uint8 (V, B, 256): the new value of each grey value
    detail: np.ndarray | None  # float64 (V, B, 2): sigma and gain g; result = G + g · (crop − G), G the crop blurred
    blur: np.ndarray  # float64 (V, B): sigma in pixels, 0 for none
    noise: np.ndarray | None  # float32 (V, B): deviation in grey levels …
    noise_from: np.ndarray | None  # int64 (V, B, 2): … and the top left corner of its part of `noise_field`

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(V, B, s, s)."""
        return (*self.blur.shape, self.size, self.size)

    def part(self, first: int, end: int) -> CropPlan:
        """The same crops of images `first` … `end` − 1 only."""
        arrays = {
            name: value[:, first:end]
            for name in ("affine", "tables", "detail", "blur", "noise", "noise_from")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **arrays)


@functools.lru_cache(maxsize=4)
def noise_field(size: int) -> np.ndarray:
    """White noise of deviation 1 that crops of a size take their noise from: float32 (S, S), always the same."""
    side = _field_side(size)
    field = streams.numpy_generator("noise field", side).standard_normal((side, side), np.float32)
    field.flags.writeable = False
    return field


def _field_side(size: int) -> int:
    return max(1024, 2 * size)  # at least (size + 1)² places to take it from


def draw_multi_crop(config: Crops, n_images: int, height: int, width: int, rng: np.random.Generator) -> list[CropPlan]:
    """The plans of the global crops (two views) and of the local ones, of images of one shape.

    What the first recipes had is drawn first, crop by crop; what was added later is drawn after it, and
    only where it is on: so the crops of older recipes keep their bits.
    """
    blur = _blur_of(config)
    sizes = (config.global_crops_size, config.local_crops_size)
    scales = (config.global_crops_scale, config.local_crops_scale)
    blurs = (blur[:2], (blur[2],) * config.local_crops_number)
    drawn = [_draw(n_images, config, group, rng) for group in blurs]
    exposures = [_exposures(len(group), n_images, config, rng) for group in blurs]
    solarized = _solarized(n_images, config, rng)
    looks = _looks([len(group) for group in blurs], n_images, config, rng)
    plans = []
    for group, (lots, sigma) in enumerate(drawn):
        curves, detail, deviation = looks[group]
        plan = CropPlan(
            size=sizes[group],
            affine=_affine(lots, sizes[group], scales[group], config, height, width),
            tables=_tables(_gammas(lots, config), curves, exposures[group], None if group else solarized),
            detail=detail,
            blur=sigma,
            noise=deviation,
            noise_from=None if deviation is None else _corners(sigma.shape, sizes[group], rng),
        )
        plans.append(plan)
    return plans


def draw_gentle(config: Crops, n_images: int, height: int, width: int, rng: np.random.Generator) -> CropPlan:
    """One view of each image for training a head, as high as the image.

    Of the photometry it takes gamma and the mildest blur; the rest is pretraining's.
    """
    lots, sigma = _draw(n_images, config, (_blur_of(config)[1],), rng)
    affine = _affine(lots, height, GENTLE_SCALE, config, height, width)
    tables = _tables(_gammas(lots, config), None, None, None)
    return CropPlan(size=height, affine=affine, tables=tables, detail=None, blur=sigma, noise=None, noise_from=None)


def _blur_of(config: Crops) -> tuple[float, float, float]:
    return config.blur if isinstance(config.blur, tuple) else (config.blur,) * 3


def _draw(
    n_images: int, config: Crops, blur: Sequence[float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each crop's numbers (V, B, 6 or 7) in [0, 1) and blur (V, B), view by view and image by image."""
    lots = np.empty((len(blur), n_images, 7 if config.jitter else 6))
    sigma = np.zeros((len(blur), n_images))
    for view, probability in enumerate(blur):
        if not probability:
            lots[view] = rng.random(lots.shape[1:])
            continue
        for image in range(n_images):
            lots[view, image] = rng.random(lots.shape[2])
            if rng.random() < probability:
                sigma[view, image] = _between(BLUR_SIGMA, rng.random())
    return lots, sigma


def _between(low_high: tuple[float, float], share: np.ndarray | float) -> np.ndarray | float:
    return low_high[0] + (low_high[1] - low_high[0]) * share


def _affine(
    lots: np.ndarray, size: int, scale: tuple[float, float], config: Crops, height: int, width: int
) -> np.ndarray:
    """Random resized crops (Szegedy et al. 2015), rotated about their middle and flipped.

    `scale` is the range of the crop's share of the image's area; its aspect ratio is 3/4 to 4/3 as far as
    such a crop fits into the image.
    """
    area = np.maximum(_between(scale, lots[..., _AREA]) * height * width, 1.0)
    aspect = np.exp(_between((math.log(3 / 4), math.log(4 / 3)), lots[..., _ASPECT]))
    aspect = np.minimum(np.maximum(aspect, area / height**2), width**2 / area)  # what fits; the area is as drawn
    crop_w, crop_h = np.minimum(width, np.sqrt(area * aspect)), np.minimum(height, np.sqrt(area / aspect))
    center_x = crop_w / 2 + lots[..., _ACROSS] * (width - crop_w)
    center_y = crop_h / 2 + lots[..., _DOWN] * (height - crop_h)
    angle = np.radians(_between((-config.rotation_deg, config.rotation_deg), lots[..., _TURN]))
    flip = np.where(lots[..., _FLIP] < config.horizontal_flip, -1.0, 1.0)
    # The inverse map: a pixel of the result to its place in the image, pixel centres at + 0.5.
    scale_x, scale_y = flip * crop_w / size, crop_h / size
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.empty((*lots.shape[:2], 2, 3))
    affine[..., 0, 0], affine[..., 0, 1] = cos * scale_x, -sin * scale_y
    affine[..., 1, 0], affine[..., 1, 1] = sin * scale_x, cos * scale_y
    middle = size / 2 - 0.5
    affine[..., 0, 2] = center_x - 0.5 - (affine[..., 0, 0] * middle + affine[..., 0, 1] * middle)
    affine[..., 1, 2] = center_y - 0.5 - (affine[..., 1, 0] * middle + affine[..., 1, 1] * middle)
    return affine


def _gammas(lots: np.ndarray, config: Crops) -> np.ndarray | None:
    if not config.jitter:
        return None
    gammas: np.ndarray = np.exp(_between((-config.jitter, config.jitter), lots[..., _GAMMA]) * 2)
    return gammas


def _exposures(n_views: int, n_images: int, config: Crops, rng: np.random.Generator) -> np.ndarray | None:
    """Factors of brightness and contrast (V, B, 2), or None if neither is on."""
    if not config.brightness and not config.contrast:
        return None
    lots = rng.random((n_views, n_images, 3))
    factors = 1 + np.array([config.brightness, config.contrast]) * (2 * lots[..., 1:] - 1)
    return np.where(lots[..., :1] < config.brightness_contrast_p, factors, 1.0)


def _solarized(n_images: int, config: Crops, rng: np.random.Generator) -> np.ndarray | None:
    """Which global crops are (2, B): some of the second view, as in DINOv2; None if it is off."""
    if not config.solarize:
        return None
    second = rng.random(n_images) < config.solarize
    return np.stack([np.zeros_like(second), second])


Look = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


def _looks(views: Sequence[int], n_images: int, config: Crops, rng: np.random.Generator) -> list[Look]:
    """For each group of views: tone curves (V, B, 256), detail (V, B, 2), deviation of the noise (V, B).

    With `look_per_image` they are drawn once an image, and all views share them.
    """
    columns = (KNOTS if config.tone_curve else 0) + (2 if config.detail else 0) + (1 if config.noise else 0)
    if config.look_per_image:
        shared = rng.random((1, n_images, columns))
        lots = [np.broadcast_to(shared, (n_views, n_images, columns)) for n_views in views]
    else:
        lots = [rng.random((n_views, n_images, columns)) for n_views in views]
    return [_look(group, config) for group in lots]


def _look(lots: np.ndarray, config: Crops) -> Look:
    curves = _tone_curves(lots[..., :KNOTS], config.tone_curve) if config.tone_curve else None
    rest = lots[..., KNOTS:] if config.tone_curve else lots
    detail = _details(rest[..., :2], config.detail) if config.detail else None
    noise = (255 * config.noise * rest[..., -1]).astype(np.float32) if config.noise else None
    return curves, detail, noise


def _corners(shape: tuple[int, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(_field_side(size) - size + 1, size=(*shape, 2))


def _tone_curves(lots: np.ndarray, strength: float) -> np.ndarray:
    """Rising curves from 0 to 1 at 256 grey values, by the integral of a positive slope: (…, 256).

    The logarithm of the slope is linear between the knots; the ends stay, since a shift or a stretch of
    the whole range is what the model's normalisation takes out again.
    """
    places = np.linspace(0, KNOTS - 1, 255)
    hats = np.maximum(0, 1 - np.abs(places[None] - np.arange(KNOTS)[:, None]))  # (KNOTS, 255)
    slope = np.exp(strength * (2 * lots - 1) @ hats)
    curve = np.zeros((*lots.shape[:-1], 256))
    np.cumsum(slope, -1, out=curve[..., 1:])
    return curve / curve[..., -1:]


def _details(lots: np.ndarray, strength: float) -> np.ndarray:
    gain = np.exp(strength * (2 * lots[..., 1] - 1))
    return np.stack([_between(DETAIL_SIGMA, lots[..., 0]), gain], -1)


def _tables(
    gammas: np.ndarray | None,
    curves: np.ndarray | None,
    exposures: np.ndarray | None,
    solarized: np.ndarray | None,
) -> np.ndarray | None:
    """All that is done to grey values one by one, as one table a crop: tone curve, gamma, exposure, solarisation."""
    if gammas is None and curves is None and exposures is None and solarized is None:
        return None
    values = _GREYS if curves is None else curves
    if gammas is not None:
        values = values ** gammas[..., None]
    if exposures is not None:
        values = np.clip(values * exposures[..., :1], 0, 1)
        values = np.clip(0.5 + (values - 0.5) * exposures[..., 1:], 0, 1)
    if solarized is not None:
        values = np.where(solarized[..., None] & (values >= 0.5), 1 - values, values)
    tables: np.ndarray = (255 * values + 0.5).astype(np.uint8)
    return tables
