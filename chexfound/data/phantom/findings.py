"""Findings of disease, as they change a chest that is being drawn.

Each finding changes the layers that the beam passes: air taken from the lungs, lines added, vessels
hidden.  Cardiomegaly is not here: it is the heart's own size (`Body.heart_ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from chexfound.data.phantom.canvas import Plane, as_plane, blank, curve, ellipsoid, grid, lines, noise
from chexfound.data.phantom.cases import Finding
from chexfound.data.phantom.frame import APEX, Frame
from chexfound.rng import numpy_generator


@dataclass
class Layers:
    """A chest while it is drawn, float32 planes of shape (SIDE, SIDE)."""

    filled: Plane
    """Part of the lung's air that fluid or pus has replaced, 0 to 1."""
    density: Plane
    """Density of what is left, 1 for lung at rest, 0 for free air."""
    vessels: Plane
    bronchi: Plane
    """Air in the bronchi that filled lung makes visible, cm; `show` says where."""
    show: Plane
    extra: Plane
    """Attenuation of what does not belong there: a pleural line, a nodule, a tube."""


def add(frame: Frame, layers: Layers, finding: Finding) -> None:
    """Draw one finding into the layers."""
    _DRAW[finding.name](frame, layers, finding)


def _nothing(frame: Frame, layers: Layers, finding: Finding) -> None:
    """Cardiomegaly is drawn as the heart itself."""


def _effusion(frame: Frame, layers: Layers, finding: Finding) -> None:
    """Fluid that fills the angle, hides the diaphragm and climbs the chest wall as a meniscus."""
    side = finding.side
    x, y = grid()
    u = np.clip(x * side / (0.97 * frame.half_width), 0, 1)
    level = float(frame.diaphragm(side, np.array([0.985 * frame.half_width]))[0]) - 2.6 - 10.5 * finding.size**1.3
    rise = 2.2 + 2.4 * finding.size
    surface = level + rise * 0.55 - rise * u * u**4 - 0.5 * rise * np.clip(0.3 - u, 0, 1)
    depth = np.asarray(y - surface, np.float32)
    soft = 0.35 if frame.case.view == "PA" else 1.1
    fluid = 0.88 / (1 + np.exp(-np.clip(depth / soft, -20, 20))) + 0.10 * np.clip(1 + depth / 5, 0, 1)
    fluid *= (x * side > 0) * np.clip(0.5 - 8 * frame.outside(), 0, 1)
    layers.filled = np.maximum(layers.filled, fluid.astype(np.float32))


def _pneumothorax(frame: Frame, layers: Layers, finding: Finding) -> None:
    """Lung drawn in from the wall, its pleura a thin line, and nothing but air beyond."""
    gap = 0.9 + 2.2 * finding.size
    edge = frame.outside(apex=1.3 * gap, inset=gap)
    x, _ = grid()
    here = (x * finding.side > 0.5).astype(np.float32)
    free = np.clip(0.5 + 8 * edge, 0, 1) * here
    layers.density = layers.density * (1 - 0.75 * free)
    layers.density = layers.density * (1 + (0.05 + 0.12 * finding.size) * (1 - free) * here)
    layers.vessels = layers.vessels * (1 - free)
    line = np.exp(-((edge / 0.075) ** 2)) * here * frame.cavity * frame.above
    layers.extra = layers.extra + (0.24 * line).astype(np.float32)


def _place(
    frame: Frame, side: int, place: tuple[float, float], low: float = 0.2, high: float = 0.82
) -> tuple[float, float]:
    """A point in a lung, clear of the heart and of the chest wall."""
    y = APEX + frame.height * (low + (high - low) * place[1])
    wall = float(frame.cage_soft(np.array([y]))[0]) * 0.97 - 2.0
    right, left, bottom = frame.heart
    down = min(max((y - frame.carina) / (bottom - frame.carina), 0.0), 1.0)
    inner = 3.6 + ((left if side > 0 else right) - 2.6) * down
    return side * (inner + (wall - inner) * place[0]), min(y, frame.dome(side) - 1.6)


def _nodule(frame: Frame, layers: Layers, finding: Finding) -> None:
    """A round shadow of 1.2 to 3 cm with an uneven rim."""
    x, y = _place(frame, finding.side, finding.place)
    radius = 0.8 + 0.8 * finding.size
    rng = numpy_generator(*frame.case.stream, "nodule")
    thickness = 2 * radius * np.sqrt(ellipsoid(x, y, radius, radius * 0.92, finding.place[0] * 3))
    rim = cv2.GaussianBlur(thickness, (0, 0), 1.1) * (1 + 0.07 * noise(rng, 0.8))
    calcified = 0.17 if finding.place[1] > 0.75 else 0.0
    layers.extra = layers.extra + (0.19 + calcified) * rim.astype(np.float32)


def _consolidation(frame: Frame, layers: Layers, finding: Finding) -> None:
    """Patchy filling of a part of a lobe, through which the bronchi stay dark."""
    x, y = _place(frame, finding.side, finding.place, 0.22, 0.9)
    x -= finding.side * 0.8
    gx, gy = grid()
    size = 3.2 + 2.6 * finding.size
    rng = numpy_generator(*frame.case.stream, "consolidation", frame.case.image, finding.side)
    near = ((gx - x) / (1.05 * size)) ** 2 + ((gy - y) / (0.95 * size)) ** 2
    cloud = 1.1 - near + 0.5 * noise(rng, 2.2) + 0.26 * noise(rng, 0.9) + 0.1 * noise(rng, 0.45)
    if finding.side < 0 and finding.place[1] < 0.35:
        cloud = np.minimum(
            cloud, (frame.carina + 3.4 + 0.06 * gx - gy) * 2.5
        )  # the upper lobe ends at the minor fissure
    patch = np.clip(0.7 * cloud, 0, 1) * (0.55 + 0.2 * finding.size) * (gx * finding.side > 0)
    layers.filled = np.maximum(layers.filled, patch.astype(np.float32))
    layers.show = np.maximum(layers.show, np.clip(1.6 * patch - 0.2, 0, 1).astype(np.float32))


def _tube(frame: Frame, layers: Layers, finding: Finding) -> None:
    """A tube in the trachea, or a central line from the neck to the right atrium's entry."""
    drawing = blank()
    if finding.kind == "endotracheal":
        tip = frame.carina - 2.5 - 3.0 * finding.size
        middle = curve([(0.35, 0.0), (0.15, APEX - 2), (-0.1, tip - 3), (-0.15, tip)])
        for offset, value in ((-0.38, 90), (0.38, 90), (0.26, 255)):
            lines(drawing, middle + np.array([offset, 0.0]), 0.13 if value < 255 else 0.20, value)
    else:
        tip = frame.carina + 2.0 + 3.0 * finding.size
        s = finding.side
        neck = [(s * 4.6, 0.0), (s * 4.0, APEX - 2.0), (s * 2.9, APEX + 2.2)]
        across = [(-0.6, APEX + 5.2)] if s > 0 else []
        path = curve([*neck, *across, (-2.0, frame.carina - 1.6), (-2.25, frame.carina + 1.2), (-2.1, tip)])
        lines(drawing, path, 0.2, 200)
    layers.extra = layers.extra + as_plane(cv2.GaussianBlur(drawing, (0, 0), 0.6), 0.75)


_DRAW = {
    "Cardiomegaly": _nothing,
    "Consolidation": _consolidation,
    "Effusion": _effusion,
    "Nodule": _nodule,
    "Pneumothorax": _pneumothorax,
    "Tube": _tube,
}
