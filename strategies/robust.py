"""A bound on how far one site's update goes, by how far the sites' updates went in the round before (`robust.clip`).

A site that sends ten times what training gives moves the mean ten times as far as it should.  With a bound of c times
the median of the last round's norms it moves it c times as far, and no honest site is cut while updates are of like
size.  The median is of more than half of the sites as long as more than half are honest.  The first round of a phase
has no round before it, and no bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from torch import Tensor

from chexfound.contract.request import MOMENTS


def norm(update: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> float:
    """How far an update's weights are, all together, from those that were sent; the optimizer's moments are none."""
    squares = (
        float((tensor.double() - previous[name].double()).square_().sum())
        for name, tensor in update.items()
        if not name.startswith(MOMENTS)
    )
    return math.sqrt(sum(squares))


def bound(clip: float | None, norms: Iterable[float]) -> float | None:
    """The largest norm that counts, by those of the round before; None where there is none."""
    before = [one for one in norms if one > 0]
    return clip * statistics.median(before) if clip is not None and before else None


def clipped(update: Mapping[str, Tensor], previous: Mapping[str, Tensor], own: float, most: float) -> dict[str, Tensor]:
    """An update of norm `own`, its weights drawn back towards what was sent until its norm is `most`."""
    part = most / own
    return {
        name: tensor if name.startswith(MOMENTS) else previous[name].lerp(tensor, part)
        for name, tensor in update.items()
    }
