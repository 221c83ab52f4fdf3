"""Landmarks of one chest, which bones, lungs, heart and findings share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from chexfound.data.phantom.canvas import SCALE, WIDTH, Plane, along_y, grid
from chexfound.data.phantom.cases import Case

_LATERAL = np.array(
    [[0, 0.33], [0.012, 0.42], [0.035, 0.50], [0.075, 0.585], [0.14, 0.69], [0.24, 0.80], [0.36, 0.885],
     [0.50, 0.945], [0.66, 0.985], [0.82, 1.0], [1.0, 0.985], [1.25, 0.95]]
)  # fmt: skip
"""The inner edge of the rib cage: (part of the lung's height from the apex, part of the half width)."""
_MEDIAL = np.array([[0, 0.33], [0.012, 0.25], [0.04, 0.19], [0.10, 0.13], [0.3, 0.085], [1.3, 0.085]])
"""The lung's edge beside the spine, in the same terms."""
APEX = 7.0
"""Height of the apices, cm."""
LEFT = 0.97
"""Width of the left lung as a part of the right one's."""


@dataclass(frozen=True)
class Frame:
    """Landmarks of one radiograph, in the canvas's cm."""

    case: Case

    @cached_property
    def half_width(self) -> float:
        """Half the widest inner width of the rib cage; the left one is 3 % narrower."""
        return self.case.body.half_width * (1.0 if self.case.view == "PA" else 0.985)

    @cached_property
    def height(self) -> float:
        """From apex to right costophrenic angle."""
        return self.case.body.lung_height * self.case.inspiration

    @cached_property
    def angle(self) -> float:
        """Height y of the right costophrenic angle."""
        return APEX + self.height

    @cached_property
    def carina(self) -> float:
        """Height y of the carina."""
        return APEX + 0.345 * self.case.body.lung_height

    def dome(self, side: int) -> float:
        """Height y of the top of a diaphragm; the left one stands lower."""
        return APEX + (0.845 if side < 0 else 0.89) * self.height

    def hilum(self, side: int) -> tuple[float, float]:
        """Give the place of a hilum; the left one stands higher."""
        return side * 0.285 * self.half_width, self.carina + (2.2 if side < 0 else 1.1)

    @cached_property
    def heart(self) -> tuple[float, float, float]:
        """Right border's distance, left border's distance from the midline, and y of its lowest point."""
        ratio = self.case.body.heart_ratio * (1.0 if self.case.view == "PA" else 1.10)
        width = 2 * 0.985 * self.half_width * ratio
        return 0.335 * width, 0.665 * width, self.dome(-1) + 0.105 * self.height

    def cage(self, y: np.ndarray) -> np.ndarray:
        """Inner half width of the rib cage at heights y."""
        part = (y - APEX) / self.height
        return np.asarray(self.half_width * np.interp(part, _LATERAL[:, 0], _LATERAL[:, 1]))

    def cage_soft(self, y: np.ndarray) -> np.ndarray:
        """The same without corners between the knots: a mean over 1.2 cm."""
        heights, smooth = self._smooth_cage
        return np.asarray(np.interp(y, heights, smooth))

    @cached_property
    def _smooth_cage(self) -> tuple[np.ndarray, np.ndarray]:
        heights = np.linspace(0, WIDTH, 420)
        return heights, np.mean([self.cage(heights + shift) for shift in np.linspace(-0.6, 0.6, 7)], axis=0)

    def medial(self, y: np.ndarray) -> np.ndarray:
        """The lung's distance from the midline beside the spine, at heights y."""
        return np.asarray(self.half_width * np.interp((y - APEX) / self.height, _MEDIAL[:, 0], _MEDIAL[:, 1]))

    def diaphragm(self, side: int, u: np.ndarray) -> np.ndarray:
        """Height y of the diaphragm's edge at distances u from the midline."""
        a = self.half_width
        top, peak = self.dome(side), 0.52 * a
        outward = np.clip((u - peak) / (0.985 * a - peak), 0, 1.2)
        inward = np.clip((peak - u) / (peak - 0.15 * a), 0, 1.4)
        low = self.angle + (0.0 if side < 0 else 0.025 * self.height)
        return top + (low - top) * outward**2.5 + (0.052 * self.height) * inward**2

    @cached_property
    def away(self) -> Plane:
        """Distance from the midline, where the left lung's narrowness is undone: (1, SIDE)."""
        x, _ = grid()
        return np.where(x < 0, -x, x / np.float32(LEFT))

    def outside(self, apex: float = 0.0, inset: float = 0.0) -> Plane:
        """Distance in cm of each pixel beyond the lungs' outer edge (negative inside), (SIDE, SIDE).

        `apex` lowers the edge and `inset` moves it towards the midline, as a collapse does.
        """
        y = grid()[1][:, 0].astype(np.float64) - apex
        edge = np.where(y < APEX, -1.0, self.cage_soft(y))
        lean = np.gradient(edge) * SCALE
        fall = np.clip((y + apex - APEX) / self.height, 0, 1)
        edge = edge - inset * (1 - 0.75 * fall)
        return (self.away - along_y(edge)) * along_y(1 / np.sqrt(1 + lean**2))

    @cached_property
    def cavity(self) -> Plane:
        """The pleural cavities between spine and ribs, without a floor: 1 inside, 0 outside."""
        _, y = grid()
        t = np.clip((self.away - along_y(self.medial(y))) * np.float32(1 / 2.6) + 0.5, 0, 1)
        return np.asarray(np.clip(0.5 - SCALE * self.outside(), 0, 1) * (t * t * (3 - 2 * t)))

    @cached_property
    def below(self) -> Plane:
        """Height in cm below the diaphragm's edge (negative above), (SIDE, SIDE)."""
        x, y = grid()
        u = np.abs(x)
        return y - np.where(x < 0, self.diaphragm(-1, u), self.diaphragm(1, u)).astype(np.float32)

    @cached_property
    def above(self) -> Plane:
        """1 above the diaphragm's edge, 0 below."""
        return np.clip(0.5 - SCALE * 0.8 * self.below, 0, 1)

    def vertebra(self, number: Any) -> Any:
        """Height y of the middle of thoracic vertebra 1 to 12 (0 and below: cervical), or of several."""
        step = 0.0905 * self.case.body.lung_height
        return APEX + 0.9 + step * (number - 1) * (1 + 0.008 * (number - 6))
