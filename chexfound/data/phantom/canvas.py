"""The plane that chests are drawn in: coordinates in cm, curves, polygons and smooth noise.

x is 0 at the midline and grows towards the right of the image, which is the patient's left; y is 0
at the top and grows downwards.  Drawn planes are float32 arrays of shape (SIDE, SIDE).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np

SIDE = 512
WIDTH = 42.0
SCALE = SIDE / WIDTH
"""Pixels per cm."""

Plane = np.ndarray[Any, Any]
_SHIFT = 4
"""OpenCV takes positions in 1/16 pixel."""


@cache
def grid() -> tuple[Plane, Plane]:
    """Positions of the pixels' centres in cm: x as a row (1, SIDE), y as a column (SIDE, 1)."""
    centre = ((np.arange(SIDE) + 0.5) / SCALE).astype(np.float32)
    return (centre - WIDTH / 2)[None, :], centre[:, None]


def curve(points: Any, steps: int = 8, closed: bool = False) -> np.ndarray:
    """A Catmull-Rom curve through the points: (n, 2) to (m, 2)."""
    p = np.asarray(points, dtype=np.float64)
    ends = (p[-1:], p[:2]) if closed else (2 * p[:1] - p[1:2], 2 * p[-1:] - p[-2:-1])
    q = np.concatenate([ends[0], p, ends[1]])
    t = (np.arange(steps) / steps)[:, None]
    a, b, c, d = (q[i : len(q) - 3 + i, None, :] for i in range(4))
    body = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    body = body.reshape(-1, 2)
    return body if closed else np.concatenate([body, p[-1:]])


def _fixed(points: np.ndarray) -> np.ndarray:
    pixels = (points + np.array([WIDTH / 2, 0.0])) * SCALE - 0.5
    return np.asarray(np.round(pixels * (1 << _SHIFT)), np.int32)


def blank() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An empty drawing, (SIDE, SIDE) uint8."""
    return np.zeros((SIDE, SIDE), np.uint8)


def fill(drawing: np.ndarray, points: np.ndarray, value: int = 255) -> None:
    """Fill a polygon given in cm, (n, 2), or several that do not overlap, (k, n, 2), with smooth edges."""
    shapes = _fixed(points)
    shapes = shapes if shapes.ndim == 3 else shapes[None]
    cv2.fillPoly(drawing, list(shapes), int(value), cv2.LINE_AA, _SHIFT)


def lines(drawing: np.ndarray, paths: np.ndarray, width: float, value: int = 255) -> None:
    """Draw open lines given in cm, (n, 2) or (k, n, 2); one thinner than a pixel is drawn fainter instead."""
    pixels = width * SCALE
    shapes = _fixed(paths)
    shapes = shapes if shapes.ndim == 3 else shapes[None]
    value, thick = int(value * min(pixels, 1.0)), max(int(round(pixels)), 1)
    cv2.polylines(drawing, list(shapes), False, value, thick, cv2.LINE_AA, _SHIFT)


def band(path: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """The outline of a band of the given width (cm) along a path: (n, 2) to (2n, 2)."""
    along = np.empty_like(path)
    along[1:-1], along[0], along[-1] = path[2:] - path[:-2], path[1] - path[0], path[-1] - path[-2]
    along *= (np.asarray(width) / 2 / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)).reshape(-1, 1)
    across = along[:, ::-1] * (-1.0, 1.0)
    return np.concatenate([path + across, (path - across)[::-1]])


def soften(plane: Plane, sigma: float) -> Plane:
    """Gaussian blur, sigma in cm; wide ones are done on a smaller plane."""
    pixels = sigma * SCALE
    step = 1 if pixels < 4 else 4 if pixels < 24 else 8
    if step == 1:
        return cv2.GaussianBlur(plane, (0, 0), pixels)
    size = plane.shape[1], plane.shape[0]
    small = cv2.resize(plane, (size[0] // step, size[1] // step), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), pixels / step)
    return cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)


def as_plane(drawing: np.ndarray, value: float = 1.0) -> Plane:
    """A drawing as float32, 255 becoming `value`."""
    return drawing.astype(np.float32) * np.float32(value / 255)


def noise(rng: np.random.Generator, size: float) -> Plane:
    """Smooth noise of unit variance at the knots, its grains about `size` cm wide."""
    knots = max(int(WIDTH / size), 2)
    return cv2.resize(
        rng.standard_normal((knots, knots), dtype=np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC
    )


def ellipsoid(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Plane:
    """Thickness of an ellipsoid with unit thickness at its centre; radii in cm, tilt in radians."""
    gx, gy = grid()
    cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
    reach = max(rx, ry)
    columns, rows = (_span(middle, reach) for middle in (x + WIDTH / 2, y))
    gx, gy = gx[:, columns] - x, gy[rows] - y
    u, v = (gx * cos + gy * sin) / rx, (gy * cos - gx * sin) / ry
    plane = np.zeros((SIDE, SIDE), np.float32)
    plane[rows, columns] = np.sqrt(np.maximum(1 - u * u - v * v, 0))
    return plane


def _span(middle: float, reach: float) -> slice:
    """The pixels within `reach` of a position, both in cm."""
    low, high = ((middle + end) * SCALE for end in (-reach, reach))
    return slice(max(int(low) - 1, 0), max(min(int(high) + 2, SIDE), 0))


def along_y(values: np.ndarray) -> Plane:
    """Values that depend on y alone, as a float32 column (SIDE, 1)."""
    return np.asarray(values, np.float32).reshape(SIDE, 1)
