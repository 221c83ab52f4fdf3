"""The bones of a chest: spine, ribs, clavicles, shoulder blades; thickness of bone in cm.

A rib is a band around the elliptical cage: phi is 0 at the spine, pi/2 at the side and pi at the
sternum, so what is drawn behind and in front is one curve in space.
"""

from __future__ import annotations

import numpy as np

from chexfound.data.phantom.canvas import Plane, as_plane, band, blank, curve, fill, lines
from chexfound.data.phantom.frame import APEX, LEFT, Frame

_DROP = (3.9, 6.2, 8.4, 10.2, 11.4, 12.2, 12.8, 13.0, 13.2, 13.4, 13.4)
"""How far each rib falls from spine to sternum, cm for a lung 26 cm high."""
_END = (2.50, 2.52, 2.52, 2.50, 2.46, 2.40, 2.32, 2.22, 2.10, 1.95, 1.6)
"""phi at which each rib's bone ends and its cartilage begins."""


_BODY = np.array(
    [(-0.5, -0.5), (0, -0.43), (0.5, -0.5), (0.45, 0), (0.5, 0.5)] + [(0, 0.43), (-0.5, 0.5), (-0.45, 0), (-0.5, -0.5)]
)
"""A vertebral body of unit size: endplates a little hollow, sides waisted."""
_PROCESS = np.array([(0.35, -0.42), (0.55, -0.40), (0.76, -0.48), (0.74, -0.30), (0.55, -0.16), (0.35, -0.10)])
"""A transverse process in the same units."""


def bones(frame: Frame) -> Plane:
    """All bones together."""
    total = _ribs(frame) + _spine(frame) + _shoulders(frame)
    return np.float32(frame.case.body.bone) * total


def _rib(frame: Frame, number: int, phi: np.ndarray) -> np.ndarray:
    """The middle of a rib of the left at angles phi: (n, 2)."""
    drop = _DROP[number - 1] * frame.case.body.lung_height / 26
    lift = 0.3 * np.sin(np.minimum(phi * 2.2, np.pi))
    y = frame.vertebra(number) + drop * (1 - np.cos(phi)) / 2 - lift
    reach = frame.cage_soft(y) + 0.35
    if number == 1:
        reach = np.minimum(reach, 0.56 * frame.half_width)
    return np.stack([np.maximum(reach * np.sin(phi), 1.6), y], 1)


def _ribs(frame: Frame) -> Plane:
    behind, front, edges = blank(), blank(), blank()
    for number in range(1, 12):
        end = _END[number - 1]
        phi = np.linspace(0.13, min(1.68, end), 28)
        outline = band(_rib(frame, number, phi), np.interp(phi, [0.1, 0.5, 1.2, 1.7], [0.72, 0.92, 1.05, 0.95]))
        fill(behind, _both(outline), 105)
        lines(edges, _both(outline[28:]), 0.13, 255)
        lines(edges, _both(outline[:28]), 0.10, 170)
        if end > 1.68:
            phi = np.linspace(1.5, end, 20)
            outline = band(_rib(frame, number, phi), np.interp(phi, [1.5, 1.9, end], [0.95, 1.1, 1.32]))
            _tube(front, _both(outline), 80)
    return as_plane(behind, 1.05) + as_plane(front, 0.85) + as_plane(edges, 0.45)


def _both(points: np.ndarray) -> np.ndarray:
    """The same on the patient's right and left: (n, 2) to (2, n, 2)."""
    return np.asarray(points * np.array([[[-1.0, 1.0]], [[LEFT, 1.0]]]))


def _tube(drawing: np.ndarray, outlines: np.ndarray, value: int) -> None:
    """Tubes of bone: the cortex above and below is passed through lengthwise and so is brighter."""
    fill(drawing, outlines, value)
    sides = outlines.reshape(-1, outlines.shape[1] // 2, 2)
    lines(drawing, sides, 0.10, min(value + 45, 255))


def _spine(frame: Frame) -> Plane:
    drawing, detail = blank(), blank()
    number = np.arange(-4, 16)
    y = frame.vertebra(number)
    tall = (frame.vertebra(number + 1) - y) * 0.84
    wide = np.interp(number, [-3, 1, 6, 12], [2.4, 2.9, 3.1, 4.0])
    middle, size = np.stack([np.zeros(len(y)), y], 1)[:, None], np.stack([wide, tall], 1)[:, None]
    for side in (-1, 1):
        fill(drawing, middle + size * (side, 1.0) * _PROCESS, 80)
    bodies = middle + size * _BODY
    fill(drawing, bodies, 150)
    lines(detail, bodies, 0.12, 150)
    for side in (-1, 1):
        lines(detail, middle + size * (side * 0.34, -0.16) + _oval(0, 0, 0.24, 0.36), 0.12, 210)
    fill(detail, middle + size * (0.0, 0.42) + _oval(0, 0, 0.20, 0.42), 150)
    return as_plane(drawing, 0.28) + as_plane(detail, 0.26)


def _oval(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 17)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def _shoulders(frame: Frame) -> Plane:
    """Clavicles, shoulder blades and the heads of the arms; AP lays the blades over the lungs."""
    portable = frame.case.view == "AP"
    flat, edges = blank(), blank()
    size = frame.half_width / 14
    for side in (-1, 1):
        s = np.array([side * size, 1.0])
        rise = -0.9 if portable else 0.0
        collar = curve(
            s * np.array([(1.7, APEX + 4.9 + rise), (3.4, APEX + 4.2 + rise), (6.3, APEX + 3.5 + rise),
                          (9.6, APEX + 1.9 + rise), (12.8, APEX + 0.2), (15.8, APEX - 0.3)])
        )  # fmt: skip
        width = np.interp(np.linspace(0, 1, len(collar)), [0, 0.06, 0.2, 0.7, 1], [1.3, 1.5, 1.05, 1.0, 1.35])
        _tube(flat, band(collar, width)[None], 135)
        away = 0.0 if portable else 3.0
        blade = s * np.array(
            [(9.4 + away, APEX + 0.6), (8.6 + away, APEX + 3), (9.6 + 1.05 * away, APEX + 8.5),
             (11.4 + 1.15 * away, APEX + 13.2), (12.6 + 1.1 * away, APEX + 11.8),
             (13.7 + 0.9 * away, APEX + 7.0), (15.0 + 0.6 * away, APEX + 3.8),
             (13.6 + 0.6 * away, APEX + 1.4)]
        )  # fmt: skip
        sheet = blank()
        fill(sheet, curve(blade, closed=True), 30)
        flat = np.maximum(flat, sheet)
        border = curve(blade[1:7])
        lines(edges, border, 0.28, 110)
        lines(edges, curve(blade[3:7]), 0.5, 120)
        crest = curve(
            s * np.array([(9.4 + away, APEX + 3.4), (12.2 + away, APEX + 1.6), (15.6 + 0.5 * away, APEX + 0.3)])
        )
        lines(edges, crest, 0.35, 80)
        fill(flat, _oval(side * (17.6 * size + 0.2 * away), APEX + 3.4, 2.3, 2.5), 110)
    return as_plane(flat, 1.25) + as_plane(edges, 1.0)
