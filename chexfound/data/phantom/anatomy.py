"""The soft parts of a chest: body, lungs, heart and great vessels, airways, pulmonary vessels.

Each function gives a thickness along the beam in cm, float32 of shape (SIDE, SIDE).
"""

from __future__ import annotations

import cv2
import numpy as np

from chexfound.data.phantom.canvas import (
    WIDTH,
    Plane,
    along_y,
    as_plane,
    band,
    blank,
    curve,
    ellipsoid,
    fill,
    grid,
    lines,
    noise,
    soften,
)
from chexfound.data.phantom.frame import APEX, Frame
from chexfound.rng import numpy_generator

SIDES = (-1, 1)


def torso(frame: Frame) -> Plane:
    """The whole body, lungs included: neck, shoulders, trunk and arms."""
    body = frame.case.body
    x, y = grid()
    trunk = frame.half_width + 1.6 + 0.8 * body.wall
    armpit = APEX + 0.42 * frame.height
    heights = np.array([-9, -5.5, -4.2, -3.2, -2.4, -1.6, -0.6, 1.0, 3.5]) + APEX
    halves = np.array([6.2, 6.3, 7.4, 9.2, 11.8, 14.6, 17.4, 20.0, 21.0]) * trunk / 18
    heights = np.append(heights, [armpit, armpit + 3, armpit + 8, APEX + frame.height, APEX + 1.5 * frame.height])
    halves = np.append(halves, [trunk + 1.6, trunk + 0.3, trunk, trunk - 0.3, trunk - 0.6])
    half = np.interp(y, heights, halves).astype(np.float32)
    deep = body.half_depth + 1.2 + 0.6 * body.wall
    depth = np.interp(
        y, [APEX - 6, APEX - 1, APEX + 4, APEX + 9, frame.angle - 4, frame.angle + 2],
        [5.8, 7.0, deep * 0.86, deep, deep, deep + 0.5],
    ).astype(np.float32)  # fmt: skip
    half, depth = np.asarray(cv2.blur(half, (1, 25))), np.asarray(cv2.blur(depth, (1, 41)))
    square = np.interp(y, [APEX, armpit], [0.95, 0.25]).astype(np.float32)
    across = (x / half) ** 2
    across *= 1 + square * (across - 1)  # from an ellipse to a flatter oval at the shoulders
    thickness = 2 * depth * np.sqrt(np.maximum(1 - across, 0))
    return np.asarray(np.maximum(thickness, _arms(frame, trunk)) + _breasts(frame))


def _arms(frame: Frame, trunk: float) -> Plane:
    """Upper arms that hang away from the body, mostly outside the field."""
    x, y = grid()
    away = np.abs(x) - (trunk + 3.2 + 0.16 * np.maximum(y - APEX - 3, 0))
    radius = 3.6 + 0.4 * frame.case.body.wall
    return np.sqrt(np.maximum(radius**2 - away * away, 0)) * (2 * np.clip((y - APEX - 1) / 3, 0, 1))


def _breasts(frame: Frame) -> Plane | float:
    """Breasts, with their crisp lower edge; in men the pectoral muscles' faint one."""
    body = frame.case.body
    x, y = grid()
    total: Plane | float = 0.0
    for side in SIDES:
        if body.breast:
            radius = 4.6 + 0.42 * body.breast
            low = APEX + (0.70 + 0.022 * body.breast) * frame.height
            shape = ellipsoid(side * 0.60 * frame.half_width, low, radius * 1.08, radius, side * 0.15)
            thick = body.breast
        else:
            low = APEX + 0.40 * frame.height
            shape = ellipsoid(side * 0.68 * frame.half_width, low, 6.6, 5.0, side * -0.35)
            thick = 0.9
        total = total + shape * (thick * np.clip((y - low + 6) / 8, 0, 1))
    return total


def lungs(frame: Frame) -> Plane:
    """Depth of both lungs, before the heart takes its part."""
    _, y = grid()
    middle = 0.33 * frame.half_width * np.clip(1 - (y - APEX) / 8, 0, 1)
    reach = along_y(np.maximum(frame.cage_soft(y) - middle, 0.1))
    across = np.clip((frame.away - middle) / reach, -1, 1)
    deep = (
        2 * frame.case.body.half_depth * np.interp(y, APEX + np.array([0, 1.0, 3, 8, 14]), [0.06, 0.28, 0.54, 0.84, 1])
    )
    depth = along_y(deep) * np.sqrt(1 - across * across)
    behind = np.clip(1 - frame.below * 0.25, 0, 1)  # lung in the sulcus behind the diaphragm's dome
    return depth * frame.cavity * np.maximum(frame.above, 0.2 * behind * behind)


def _silhouette(frame: Frame) -> np.ndarray:
    """The outline of heart and great vessels, clockwise from the right of the neck: (n, 2)."""
    right, left, low = frame.heart
    top, knob = frame.carina, frame.case.body.aorta
    arch = 0.245 * frame.half_width * knob
    heart = low - top
    wide = 1.0 if frame.case.view == "PA" else 1.12
    outline = [
        (-2.0, 0.0), (-2.1 * wide, APEX + 2), (-2.5 * wide, top - 3), (-2.75 * wide, top + 0.5),
        (-0.7 * right, top + 0.3 * heart), (-0.93 * right, top + 0.47 * heart), (-right, top + 0.66 * heart),
        (-0.95 * right, low - 0.16 * heart), (-0.72 * right, low - 0.02 * heart), (0.0, low + 1.4),
        (0.45 * left, low + 1.2), (0.80 * left, low + 0.2), (0.965 * left, low - 0.09 * heart),
        (left, low - 0.2 * heart), (0.93 * left, low - 0.36 * heart), (0.76 * left, low - 0.53 * heart),
        (0.30 * left + 1.9, top + 0.32 * heart), (0.13 * left + 2.5, top + 0.19 * heart),
        (2.55 * wide, top + 0.4), (0.98 * arch, top - 0.7), (arch, top - 1.7), (0.9 * arch, top - 2.9),
        (2.2 * wide, top - 4.2), (2.1 * wide, APEX + 2), (2.0, 0.0),
    ]  # fmt: skip
    return curve(outline, closed=True)


def mediastinum(frame: Frame) -> Plane:
    """Heart and great vessels: what takes the place of lung in the middle."""
    drawing = blank()
    fill(drawing, _silhouette(frame))
    inside = cv2.distanceTransform((drawing > 127).astype(np.uint8), cv2.DIST_L2, 5) * (WIDTH / drawing.shape[1])
    _, y = grid()
    reach = along_y(np.interp(y, [frame.carina - 2, frame.carina + 7], [2.2, 4.0]))
    deep = along_y(np.interp(y, [frame.carina - 2, frame.carina + 7], [1.55, 1.90]) * frame.case.body.half_depth)
    near = np.clip(1 - inside / reach, 0, 1)
    thickness = soften(deep * np.sqrt(1 - near * near), 0.5)
    return np.maximum(thickness, 2.2) * as_plane(drawing)


def aorta(frame: Frame) -> Plane:
    """The descending aorta, a tube on the left of the spine, seen through the heart."""
    drawing = blank()
    top, size = frame.carina - 1.6, 2.5 * frame.case.body.aorta
    edge = 0.245 * frame.half_width * frame.case.body.aorta - size / 2
    path = curve([(edge, top), (edge - 0.1, top + 5), (edge - 0.7, top + 11), (edge - 1.3, frame.angle + 3)])
    fill(drawing, band(path, size))
    return 0.75 * size * cv2.GaussianBlur(as_plane(drawing), (0, 0), 1.2)


def airways(frame: Frame) -> Plane:
    """Air in the trachea and main bronchi."""
    drawing, y = blank(), frame.carina
    trachea = curve([(0.1, 0.0), (0.05, APEX), (-0.25, y - 2.5), (-0.15, y)])
    fill(drawing, band(trachea, np.linspace(1.75, 1.6, len(trachea))), 190)
    for side, reach, drop in ((-1, 2.6, 2.4), (1, 3.9, 2.3)):
        bronchus = curve(
            [(-0.15 + 0.3 * side, y - 0.3), (side * 0.55 * reach, y + 0.5 * drop), (side * reach, y + drop)]
        )
        fill(drawing, band(bronchus, np.linspace(1.25, 0.9, len(bronchus))), 150)
    return as_plane(cv2.GaussianBlur(drawing, (0, 0), 1.5), 2.8)


def stomach(frame: Frame) -> Plane | float:
    """The gas under the left diaphragm, flat below when it stands on fluid."""
    radius = frame.case.body.gas
    if not radius:
        return 0.0
    x, y = grid()
    top = frame.dome(1) + 0.7
    centre = 0.46 * frame.half_width
    shape = ellipsoid(centre, top + 0.75 * radius, 1.35 * radius, 0.8 * radius, 0.1)
    level = np.clip((top + 1.05 * radius - y) * 4, 0, 1) if frame.case.view == "PA" else 1.0
    return 1.5 * radius * np.sqrt(shape) * level


def vessels(frame: Frame) -> tuple[Plane, Plane]:
    """Pulmonary vessels, and the bronchi that run with the arteries (thickness of each in cm)."""
    rng = numpy_generator(*frame.case.stream, "vessels")
    arteries, veins, bronchi, roots = blank(), blank(), blank(), as_plane(blank())
    for side in SIDES:
        x, y = frame.hilum(side)
        angles = np.array([-1.25, -0.8, -0.3, 0.15, 0.6, 0.95, 1.25]) + rng.normal(0, 0.1, 7)
        widths = np.array([0.44, 0.46, 0.36, 0.40, 0.50, 0.66, 0.60])
        _tree(arteries, rng, side, np.array([[x, y]] * 7), angles, widths, 6)
        lower = frame.carina + 0.27 * (frame.heart[2] - frame.carina)
        angles = np.array([-1.0, -0.45, 0.1, 0.4, 0.75]) + rng.normal(0, 0.1, 5)
        _tree(veins, rng, side, np.array([[side * 2.4, lower]] * 5), angles, np.full(5, 0.44), 5)
        bronchi = np.maximum(bronchi, np.minimum(arteries, 90))
        roots += 1.5 * ellipsoid(x - 0.3 * side, y + 0.3, 1.25, 1.9, -0.3 * side)
        fill(arteries, band(_interlobar(x, y, side), np.linspace(1.5, 0.8, 17)), 255)
    both = cv2.GaussianBlur(arteries, (0, 0), 0.8).astype(np.float32) + cv2.GaussianBlur(veins, (0, 0), 0.9)
    bronchi = np.roll(bronchi, (5, 4), (0, 1))  # a bronchus runs beside each artery
    return both * np.float32(1.0 / 255) + soften(roots, 0.35), as_plane(bronchi)


def _interlobar(x: float, y: float, side: int) -> np.ndarray:
    """The descending pulmonary artery's path."""
    return curve([(x - 0.4 * side, y - 0.5), (x + 0.35 * side, y + 0.9), (x + 0.9 * side, y + 2.6)])


def _tree(
    drawing: np.ndarray,
    rng: np.random.Generator,
    side: int,
    start: np.ndarray,
    angle: np.ndarray,
    width: np.ndarray,
    depth: int,
) -> None:
    """Grow a tree, two branches from each, and draw it thin twigs first (brightness is thickness)."""
    generations = []
    length = 2.5
    for _ in range(depth):
        bend = angle + rng.normal(0, 0.16, len(angle))
        middle = start + (0.5 * length * np.stack([side * np.cos(angle), np.sin(angle)], 1))
        end = middle + (0.5 * length * np.stack([side * np.cos(bend), np.sin(bend)], 1))
        generations.append((np.stack([start, middle, end], 1), width))
        fork = rng.uniform(0.16, 0.5, (2, len(angle)))
        start = np.concatenate([end, end])
        angle = np.concatenate([bend + fork[0], bend - fork[1]])
        width = np.concatenate([0.78 * width, 0.58 * width])
        length *= 0.86
    for paths, sizes in reversed(generations):
        level = np.clip(np.round(sizes / 0.085).astype(int), 1, 8)
        for step in np.unique(level):
            size = 0.085 * step
            lines(drawing, paths[level == step], size, int(min(20 + 330 * size, 255)))


def grain(frame: Frame) -> Plane:
    """Give what the vessels too fine to draw do to the lungs' density: mean 0, about unit variance."""
    rng = numpy_generator(*frame.case.stream, "grain")
    return 0.9 * noise(rng, 0.25) + 0.35 * noise(rng, 0.6) + 0.3 * noise(rng, 4.0)
