"""From the beam to the pixels of one site's scanner: field, scatter, blur, noise, film curve, codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from chexfound.data.phantom.canvas import SCALE, WIDTH, Plane
from chexfound.data.phantom.cases import Case
from chexfound.data.phantom.frame import APEX
from chexfound.data.phantom.sites import Hospital
from chexfound.rng import numpy_generator


@dataclass(frozen=True)
class Exposure:
    """A finished radiograph: stored values with what a reader needs to show them."""

    pixels: np.ndarray[Any, Any]
    """(rows, columns), uint8 or uint16, values below 2**bits."""
    spacing: float
    """Side of a pixel, mm."""
    window: tuple[float, float]
    """Centre and width."""


def expose(attenuation: Plane, case: Case, site: Hospital, size_px: int) -> Exposure:
    """Take the picture.

    Args:
        attenuation: line integrals, (SIDE, SIDE).
        case: which radiograph; its stream gives pose and noise.
        site: whose scanner.
        size_px: the longer side of the picture.
    """
    rng = numpy_generator(*case.stream, "exposure", case.image)
    spacing = max(site.field) / size_px
    columns, rows = (int(round(side / spacing)) for side in site.field)
    beam = _posed(attenuation, case, site, rng, (columns, rows))
    beam = _marker(beam, site, rng)
    primary = np.exp(-cv2.GaussianBlur(beam, (0, 0), max(site.blur / spacing, 0.3)))
    light = primary + _scattered(primary, site)
    log = -np.log(light)
    grain = cv2.GaussianBlur(rng.standard_normal((rows, columns), dtype=np.float32), (0, 0), 0.55)
    log += np.float32(1.6 * site.noise * rng.uniform(0.8, 1.3)) * grain / np.sqrt(light)
    return Exposure(_coded(_film(log, site, rng), site, rng), spacing * 10, _window(site))


def _posed(attenuation: Plane, case: Case, site: Hospital, rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """The field of the detector, placed over the patient with a little turn and shift: (rows, columns)."""
    loose = 1.0 if case.view == "PA" else 2.2
    columns, rows = size
    body = case.body
    middle = APEX + 0.5 * body.lung_height + rng.normal(0.2, 0.4 * loose) + 0.4
    wanted = max(2 * body.half_width + 5.5, body.lung_height + 8.5)
    zoom = wanted / min(site.field) * rng.normal(1.0, 0.02)
    step = zoom * max(site.field) / max(size) * SCALE
    turn = np.deg2rad(rng.normal(0, 1.0 * loose))
    cos, sin = step * np.cos(turn), step * np.sin(turn)
    x, y = (WIDTH / 2 + rng.normal(0, 0.35 * loose)) * SCALE, middle * SCALE
    matrix = np.array(
        [
            [cos, -sin, x - cos * columns / 2 + sin * rows / 2],
            [sin, cos, y - sin * columns / 2 - cos * rows / 2],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(attenuation, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _marker(beam: Plane, site: Hospital, rng: np.random.Generator) -> Plane:
    """The lead letter of the side, near the shoulder on that side: the patient's left is on the right."""
    rows, columns = beam.shape
    size = 0.045 * rows
    x = columns * (0.86 if site.marker == "L" else 0.09) + rng.normal(0, 0.012) * columns
    y = rows * (0.12 + abs(rng.normal(0, 0.015)))
    drawing = np.zeros(beam.shape, np.uint8)
    thick = max(int(round(rows / 150)), 1)
    cv2.putText(drawing, site.marker, (int(x), int(y)), cv2.FONT_HERSHEY_SIMPLEX, size / 22, 255, thick, cv2.LINE_AA)
    return np.asarray(beam + drawing.astype(np.float32) * np.float32(8.0 / 255))


def _scattered(primary: Plane, site: Hospital) -> Plane:
    """Light from elsewhere, which greys what is dense: a wide blur of the beam and a constant."""
    rows, columns = primary.shape
    small = cv2.resize(np.minimum(primary, 0.25), (columns // 16 + 1, rows // 16 + 1), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), rows / 16 / 14)
    return cv2.resize(small, (columns, rows), interpolation=cv2.INTER_LINEAR) * np.float32(site.scatter) + np.float32(
        0.006
    )


def _film(log: Plane, site: Hospital, rng: np.random.Generator) -> Plane:
    """Grey values in [0, 1], bone bright: range found from the picture, unsharp mask, sigmoid curve."""
    rows, columns = log.shape
    if site.edges:
        small = cv2.resize(log, (columns // 8, rows // 8), interpolation=cv2.INTER_AREA)
        smooth = cv2.resize(
            cv2.GaussianBlur(small, (0, 0), rows / 8 / 28), (columns, rows), interpolation=cv2.INTER_LINEAR
        )
        log = log + np.float32(site.edges) * (log - smooth)
    centre = log[rows // 6 : -rows // 8 : 7, columns // 8 : -columns // 8 : 7]
    low, high = np.percentile(centre, (1.0, 99.0))
    low, high = low - 0.17 * (high - low), high + 0.10 * (high - low)
    value = (log - np.float32(low)) * np.float32(1 / (high - low))
    steep, middle = site.contrast * rng.uniform(0.9, 1.1), site.brightness + rng.normal(0, 0.02)
    bottom, top = (1 / (1 + np.exp(-steep * (end - middle))) for end in (0.0, 1.0))
    value = 1 / (1 + np.exp(np.float32(-steep) * (value - np.float32(middle))))
    return np.asarray(np.clip((value - np.float32(bottom)) * np.float32(1 / (top - bottom)), 0, 1))


def _coded(grey: Plane, site: Hospital, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Stored values: collimated, scaled into the site's part of the range, inverted where it does."""
    rows, columns = grey.shape
    widest, shade = site.border
    if widest:
        left, right, top, bottom = (int(side) for side in rng.uniform(0, widest, 4) * (columns, columns, rows, rows))
        mask = np.zeros(grey.shape, np.float32)
        mask[top : rows - bottom, left : columns - right] = 1
        soft = cv2.GaussianBlur(mask, (0, 0), 0.8)
        grey = grey * soft + np.float32(shade) * (1 - soft)
    scale = 2**site.bits - 1
    if site.inverted:
        grey = 1 - grey
    code = np.float32(site.code[0] * scale) + grey * np.float32((site.code[1] - site.code[0]) * scale)
    return np.round(code).astype(np.uint8 if site.bits == 8 else np.uint16)


def _window(site: Hospital) -> tuple[float, float]:
    scale = 2**site.bits - 1
    low, high = (float(round(part * scale)) for part in site.code)
    return (low + high + 1) / 2, high - low + 1
