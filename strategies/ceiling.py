"""The most that one site may weigh in a mean of several: max(½, 2/n) of n sites, so that none decides alone.

A site's weight is what it enrolled with, which nobody else can count.  Weights are cut before the first reply comes,
by what all enrolled; where all are below the ceiling nothing changes, to the last bit.  Of two sites each may be all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUTSIZED = 10  # times the median of the sites' images, from which on a site is looked at


def share(n: int) -> float:
    """Give the largest share that one of n sites may have of their sum: max(1/2, 2/n), and 1 of a lone one."""
    return max(0.5, 2 / n) if n > 1 else 1.0


def most(weights: Sequence[int]) -> int | None:
    """The largest weight that one of these sites may have, beside the others; None where there is no ceiling.

    Those without a weight do not count.
    """
    there = [weight for weight in weights if weight > 0]
    if len(there) < 3:
        return None
    part = share(len(there))
    return round((sum(there) - max(there)) * part / (1 - part))


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Hold the most that a site may weigh in one phase.

    Args:
        images: the largest weight of a site.
        labelled: the same of each finding's rows.
        capped: the sites that are cut, each with the largest share that it would have had.
    """

    images: int | None = None
    labelled: tuple[int | None, ...] = ()
    capped: Mapping[str, float]

    @staticmethod
    def of(images: Mapping[str, int], labelled: Mapping[str, Sequence[int]] | None = None) -> Ceiling:
        """By each site's images, and by its labelled images of each finding."""
        columns = [dict(zip(images, column, strict=True)) for column in zip(*(labelled or {}).values(), strict=True)]
        capped: dict[str, float] = {}
        limits = []
        for weights in (dict(images), *columns):
            limits.append(limit := most(list(weights.values())))
            for site, weight in weights.items():
                if limit is not None and weight > limit:
                    capped[site] = max(capped.get(site, 0.0), round(weight / sum(weights.values()), 4))
        return Ceiling(images=limits[0], labelled=tuple(limits[1:]), capped=capped)


def cut(weight: int, limit: int | None) -> int:
    """A weight, below the ceiling."""
    return weight if limit is None else min(weight, limit)


def outsized(images: Mapping[str, int]) -> dict[str, float]:
    """Sites with ten times as many images as the median of the sites, or more: how many times."""
    median = statistics.median(images.values()) if len(images) > 1 else 0
    return {
        site: round(number / median, 1) for site, number in images.items() if median and number >= OUTSIZED * median
    }
